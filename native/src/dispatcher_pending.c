/*
 * What pyfuse3 owes an answer to: requests by their unique number. Readers add, the pump takes.
 */
#define _GNU_SOURCE
#include "dispatcher_internal.h"

#include <errno.h>
#include <stdlib.h>

#define FIRST_BUCKETS 64u

/* Uniques of requests are even and mostly ascending; those that are sent again have bit 63 set. Fibonacci hashing spreads
 * both. */
static size_t bucket_of(uint64_t unique, size_t n_buckets)
{
    return (size_t)((unique * 0x9E3779B97F4A7C15ull) >> 32) & (n_buckets - 1);
}

int pbk_pending_init(struct pbk_pending *pending)
{
    pending->buckets = calloc(FIRST_BUCKETS, sizeof *pending->buckets);
    if (!pending->buckets)
        return -ENOMEM;
    pending->n_buckets = FIRST_BUCKETS;
    pending->is_closed = false;
    atomic_init(&pending->n, 0);
    int error = pthread_mutex_init(&pending->lock, NULL);
    if (error) {
        free(pending->buckets);
        pending->buckets = NULL;
    }
    return -error;
}

void pbk_pending_destroy(struct pbk_pending *pending)
{
    pthread_mutex_destroy(&pending->lock);
    free(pending->buckets);
}

/* Under the lock. Without memory the table stays as it is and gets slower. */
static void grow(struct pbk_pending *pending)
{
    size_t n_buckets = pending->n_buckets * 2;
    struct pbk_request **buckets = calloc(n_buckets, sizeof *buckets);
    if (!buckets)
        return;
    for (size_t i = 0; i < pending->n_buckets; i++) {
        for (struct pbk_request *request = pending->buckets[i], *next; request; request = next) {
            next = request->next;
            size_t at = bucket_of(request->unique, n_buckets);
            request->next = buckets[at];
            buckets[at] = request;
        }
    }
    free(pending->buckets);
    pending->buckets = buckets;
    pending->n_buckets = n_buckets;
}

int pbk_pending_add(struct pbk_pending *pending, const struct fuse_in_header *header, struct pbk_job *job, uint32_t pid)
{
    struct pbk_request *request = malloc(sizeof *request);
    if (!request)
        return -ENOMEM;
    request->unique = header->unique;
    request->nodeid = header->nodeid;
    request->opcode = header->opcode;
    request->pid = pid;
    request->job = job;

    pthread_mutex_lock(&pending->lock);
    bool is_closed = pending->is_closed;
    if (!is_closed) {
        if (atomic_load_explicit(&pending->n, memory_order_relaxed) >= pending->n_buckets)
            grow(pending);
        size_t at = bucket_of(request->unique, pending->n_buckets);
        request->next = pending->buckets[at];
        pending->buckets[at] = request;
        atomic_fetch_add_explicit(&pending->n, 1, memory_order_relaxed);
    }
    pthread_mutex_unlock(&pending->lock);
    if (is_closed) {
        free(request);
        return -ECONNABORTED;
    }
    return 0;
}

struct pbk_request *pbk_pending_take(struct pbk_pending *pending, uint64_t unique)
{
    pthread_mutex_lock(&pending->lock);
    struct pbk_request **link = &pending->buckets[bucket_of(unique, pending->n_buckets)];
    while (*link && (*link)->unique != unique)
        link = &(*link)->next;
    struct pbk_request *found = *link;
    if (found) {
        *link = found->next;
        atomic_fetch_sub_explicit(&pending->n, 1, memory_order_relaxed);
    }
    pthread_mutex_unlock(&pending->lock);
    return found;
}

bool pbk_dispatcher_request(struct pbk_dispatcher *d, uint32_t token, uint64_t *unique, uint32_t *pid)
{
    struct pbk_pending *pending = &d->pending;
    bool is_found = false;
    pthread_mutex_lock(&pending->lock);
    for (size_t i = 0; i < pending->n_buckets && !is_found; i++)
        for (const struct pbk_request *request = pending->buckets[i]; request && !is_found; request = request->next)
            if (pbk_token_of(request->unique) == token) {
                *unique = request->unique;
                *pid = request->pid;
                is_found = true;
            }
    pthread_mutex_unlock(&pending->lock);
    return is_found;
}

struct pbk_request *pbk_pending_close(struct pbk_pending *pending)
{
    struct pbk_request *all = NULL;
    pthread_mutex_lock(&pending->lock);
    pending->is_closed = true;
    for (size_t i = 0; i < pending->n_buckets; i++) {
        for (struct pbk_request *request = pending->buckets[i], *next; request; request = next) {
            next = request->next;
            request->next = all;
            all = request;
        }
        pending->buckets[i] = NULL;
    }
    atomic_store_explicit(&pending->n, 0, memory_order_relaxed);
    pthread_mutex_unlock(&pending->lock);
    return all;
}

/*
 * The pool: what may wait for the disk for long (FSYNC), requests whose copy-up has ended, and pages that wait for space.
 * Called by readers and the pump (push, hold) and by the pool's own threads.
 */
#define _GNU_SOURCE
#include "dispatcher_internal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define HELD_RETRY_NS UINT64_C(250000000)
#define NS_PER_S UINT64_C(1000000000)
/* Tried four times a second, a page that finds no space says that there still is none. */
#define FULL_ENDS_NS (2 * NS_PER_S)

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * NS_PER_S + (uint64_t)now.tv_nsec;
}

struct pbk_job *pbk_job_new(const struct fuse_in_header *header, const unsigned char *body, size_t length)
{
    struct pbk_job *job = malloc(sizeof *job + length);
    if (!job)
        return NULL;
    job->next = NULL;
    job->error = 0;
    job->n_parked = 0;
    job->was_held = false;
    job->length = length;
    job->header = *header;
    if (length)
        memcpy(job->body, body, length);
    return job;
}

static void push(struct pbk_pool *pool, struct pbk_job ***tail, _Atomic size_t *n, struct pbk_job *job)
{
    pthread_mutex_lock(&pool->lock);
    bool is_closed = pool->is_closed;
    if (!is_closed) {
        job->next = NULL;
        **tail = job;
        *tail = &job->next;
        atomic_fetch_add_explicit(n, 1, memory_order_relaxed);
        /* Any thread can take a retry; an fsync may have to be left to the one whose turn it is, which looks again anyway. */
        pthread_cond_signal(&pool->wake);
    }
    pthread_mutex_unlock(&pool->lock);
    if (is_closed)
        free(job);
}

void pbk_pool_push_fsync(struct pbk_dispatcher *d, struct pbk_job *job)
{
    push(&d->pool, &d->pool.fsync_tail, &d->pool.n_fsync_queued, job);
}

void pbk_pool_push_retry(struct pbk_dispatcher *d, struct pbk_job *job)
{
    push(&d->pool, &d->pool.retry_tail, &d->pool.n_retry_queued, job);
}

/*
 * Pool locked. Whether the time to wait is over, which counts from when the disk was full: with few dirty pages allowed, the
 * pages of one writer come one after the other, and each of them would wait as long again.
 */
static bool has_waited(struct pbk_pool *pool, int hold_s, uint64_t now)
{
    if (now > pool->full_seen_ns + FULL_ENDS_NS)
        pool->full_since_ns = now;
    pool->full_seen_ns = now;
    return hold_s > 0 && now >= pool->full_since_ns + (uint64_t)hold_s * NS_PER_S;
}

bool pbk_pool_hold(struct pbk_dispatcher *d, struct pbk_job *job)
{
    struct pbk_pool *pool = &d->pool;
    uint64_t now = now_ns();
    bool is_new = !job->was_held;
    bool is_first = false;

    pthread_mutex_lock(&pool->lock);
    if (has_waited(pool, d->hold_s, now)) {
        pthread_mutex_unlock(&pool->lock);
        return false;
    }
    job->was_held = true;
    bool is_closed = pool->is_closed;
    if (is_closed) {
        free(job);
    } else if (is_new) {
        job->next = NULL;
        *pool->held_tail = job;
        pool->held_tail = &job->next;
        is_first = atomic_fetch_add_explicit(&pool->n_held, 1, memory_order_relaxed) == 0;
    } else {
        /* The one that was tried stays the first. */
        job->next = pool->held_head;
        if (!pool->held_head)
            pool->held_tail = &job->next;
        pool->held_head = job;
    }
    pool->held_retry_ns = now + HELD_RETRY_NS;
    pthread_cond_signal(&pool->wake);
    pthread_mutex_unlock(&pool->lock);
    if (is_new)
        pbk_count(&d->counters.held, 1);
    if (is_first)
        pbk_dispatcher_log(d, "no space left for the diff: written pages wait until there is some");
    return true;
}

static struct pbk_job *take(struct pbk_job **head, struct pbk_job ***tail)
{
    struct pbk_job *job = *head;
    *head = job->next;
    if (!*head)
        *tail = head;
    return job;
}

static void run_fsync(struct pbk_worker *worker, struct pbk_job *job)
{
    struct pbk_dispatcher *d = worker->dispatcher;
    struct fuse_fsync_in in;
    int error = -EIO;
    if (job->length >= sizeof in) {
        memcpy(&in, job->body, sizeof in);
        struct pbk_node *node = pbk_nodes_get(d->nodes, job->header.nodeid);
        if (!node) {
            worker->job = job;
            pbk_park_for_open(worker, &job->header, job->body, job->length);
            free(worker->job); /* unless it was parked */
            worker->job = NULL;
            return;
        }
        error = pbk_node_fsync(node, in.fsync_flags & FUSE_FSYNC_FDATASYNC);
        pbk_node_put(node);
    }
    /* ENOSYS would make the kernel take every later fsync for done. */
    pbk_reply(d, job->header.unique, error == -ENOSYS ? -EIO : error, NULL, 0);
    free(job);
}

/* Whether the copy-up of a written-back page found no space, and the page waits for some now. */
static bool hold_copy_up(struct pbk_dispatcher *d, struct pbk_job *job)
{
    struct fuse_write_in in;
    if ((job->error != -ENOSPC && job->error != -EDQUOT) || d->hold_s == 0 || job->header.opcode != FUSE_WRITE)
        return false;
    memcpy(&in, job->body, sizeof in); /* it was long enough when it was parked */
    if (!(in.write_flags & FUSE_WRITE_CACHE))
        return false;
    int error = job->error;
    job->error = 0;
    job->n_parked = 0;
    if (pbk_pool_hold(d, job))
        return true;
    job->error = error;
    return false;
}

static void run_retry(struct pbk_worker *worker, struct pbk_job *job)
{
    struct pbk_dispatcher *d = worker->dispatcher;
    if (job->error && hold_copy_up(d, job))
        return;
    worker->job = job;
    if (job->error)
        pbk_reply(d, job->header.unique, job->error, NULL, 0);
    else if (!pbk_answer_hot(worker, &job->header, job->body, job->length))
        pbk_reply(d, job->header.unique, -EIO, NULL, 0);
    if (!worker->job)
        return; /* it waits again */
    bool was_held = worker->job->was_held;
    free(worker->job);
    worker->job = NULL;
    if (was_held && atomic_fetch_sub_explicit(&d->pool.n_held, 1, memory_order_relaxed) == 1)
        pbk_dispatcher_log(d, "no written page waits for space any more");
}

/* Tries the first of the held, one thread at a time. Pool locked, also on return. */
static void try_held(struct pbk_worker *worker, struct pbk_pool *pool)
{
    struct pbk_job *job = take(&pool->held_head, &pool->held_tail);
    pool->is_trying_held = true;
    pool->held_retry_ns = 0; /* the next one at once, unless this one is held again */
    pthread_mutex_unlock(&pool->lock);
    run_retry(worker, job);
    pthread_mutex_lock(&pool->lock);
    pool->is_trying_held = false;
}

/* Waits for work, or for the time to look for space. Pool locked. */
static void wait_for_work(struct pbk_pool *pool)
{
    if (!pool->held_head || pool->is_trying_held) {
        pthread_cond_wait(&pool->wake, &pool->lock);
        return;
    }
    struct timespec at = {
        .tv_sec = (time_t)(pool->held_retry_ns / NS_PER_S),
        .tv_nsec = (long)(pool->held_retry_ns % NS_PER_S),
    };
    pthread_cond_clockwait(&pool->wake, &pool->lock, CLOCK_MONOTONIC, &at);
}

void *pbk_pool_main(void *arg)
{
    struct pbk_worker *worker = arg;
    struct pbk_dispatcher *d = worker->dispatcher;
    struct pbk_pool *pool = &d->pool;

    pbk_worker_begin();
    pthread_mutex_lock(&pool->lock);
    while (!pool->is_closed) {
        if (pool->retry_head) {
            struct pbk_job *job = take(&pool->retry_head, &pool->retry_tail);
            atomic_fetch_sub_explicit(&pool->n_retry_queued, 1, memory_order_relaxed);
            pthread_mutex_unlock(&pool->lock);
            run_retry(worker, job);
            pthread_mutex_lock(&pool->lock);
        } else if (pool->held_head && !pool->is_trying_held && now_ns() >= pool->held_retry_ns) {
            try_held(worker, pool);
        } else if (pool->fsync_head && pool->n_fsyncs_running < d->n_fsync) {
            struct pbk_job *job = take(&pool->fsync_head, &pool->fsync_tail);
            atomic_fetch_sub_explicit(&pool->n_fsync_queued, 1, memory_order_relaxed);
            pool->n_fsyncs_running++;
            pthread_mutex_unlock(&pool->lock);
            run_fsync(worker, job);
            pthread_mutex_lock(&pool->lock);
            pool->n_fsyncs_running--;
        } else {
            wait_for_work(pool);
        }
    }
    pthread_mutex_unlock(&pool->lock);
    return NULL;
}

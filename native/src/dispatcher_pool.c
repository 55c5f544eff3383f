/*
 * The pool: what may wait for the disk for long (FSYNC), and requests whose copy-up has ended. Called by readers and the
 * pump (push) and by the pool's own threads.
 */
#define _GNU_SOURCE
#include "dispatcher_internal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

struct pbk_job *pbk_job_new(const struct fuse_in_header *header, const unsigned char *body, size_t length)
{
    struct pbk_job *job = malloc(sizeof *job + length);
    if (!job)
        return NULL;
    job->next = NULL;
    job->error = 0;
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

static struct pbk_job *take(struct pbk_job **head, struct pbk_job ***tail, _Atomic size_t *n)
{
    struct pbk_job *job = *head;
    *head = job->next;
    if (!*head)
        *tail = head;
    atomic_fetch_sub_explicit(n, 1, memory_order_relaxed);
    return job;
}

static void run_fsync(struct pbk_dispatcher *d, const struct pbk_job *job)
{
    struct fuse_fsync_in in;
    int error = -EIO;
    if (job->length >= sizeof in) {
        memcpy(&in, job->body, sizeof in);
        struct pbk_node *node = pbk_nodes_get(d->nodes, job->header.nodeid);
        if (node) {
            error = pbk_node_fsync(node, in.fsync_flags & FUSE_FSYNC_FDATASYNC);
            pbk_node_put(node);
        }
    }
    /* ENOSYS would make the kernel take every later fsync for done. */
    pbk_reply(d, job->header.unique, error == -ENOSYS ? -EIO : error, NULL, 0);
}

static void run_retry(struct pbk_worker *worker, const struct pbk_job *job)
{
    if (job->error)
        pbk_reply(worker->dispatcher, job->header.unique, job->error, NULL, 0);
    else if (!pbk_answer_hot(worker, &job->header, job->body, job->length, false))
        pbk_reply(worker->dispatcher, job->header.unique, -EIO, NULL, 0);
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
            struct pbk_job *job = take(&pool->retry_head, &pool->retry_tail, &pool->n_retry_queued);
            pthread_mutex_unlock(&pool->lock);
            run_retry(worker, job);
            free(job);
            pthread_mutex_lock(&pool->lock);
        } else if (pool->fsync_head && pool->n_fsyncs_running < d->n_fsync) {
            struct pbk_job *job = take(&pool->fsync_head, &pool->fsync_tail, &pool->n_fsync_queued);
            pool->n_fsyncs_running++;
            pthread_mutex_unlock(&pool->lock);
            run_fsync(d, job);
            free(job);
            pthread_mutex_lock(&pool->lock);
            pool->n_fsyncs_running--;
        } else {
            pthread_cond_wait(&pool->wake, &pool->lock);
        }
    }
    pthread_mutex_unlock(&pool->lock);
    return NULL;
}

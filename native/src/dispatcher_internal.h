/*
 * What the dispatcher's own files share: its lists, each with its lock, and its threads.
 *
 *   dispatcher.c          life: make, start, stop; counters
 *   dispatcher_reader.c   readers: take a request, answer or forward it
 *   dispatcher_hot.c      the requests that are answered from nodes
 *   dispatcher_pool.c     the pool: FSYNC, and requests that waited for a copy-up or for space
 *   dispatcher_pump.c     the pump and the notifier
 *   dispatcher_pending.c  what pyfuse3 owes an answer to
 *
 * Every lock here but life is a leaf: nothing is locked, written or called on a node while one is held. life is taken by start and
 * stop only, and by no thread of the dispatcher.
 */
#ifndef PBK_DISPATCHER_INTERNAL_H
#define PBK_DISPATCHER_INTERNAL_H

#include <pthread.h>
#include <stdatomic.h>
#include <sys/types.h>
#include <sys/uio.h>

#include "pbk/dispatcher.h"
#include "pbk/fuse_proto.h"

#define PBK_MAX_READERS 16u
#define PBK_MAX_POOL 17u
#define PBK_N_OPCODES 64u /* opcodes at or above it are counted in slot 0 */

/* Enough for a megabyte of pages from a raw chain, one entry a page (see pbk_node_read), and the header. */
#define PBK_N_IOV (PBK_FUSE_MAX_IO / PBK_BLCKSZ + 8u)

/*
 * A request that outlives its reader's buffer. Owned by one list or thread at a time: the reader that makes it, pending
 * (while pyfuse3 copies up), the pool's queues, the pool thread that runs it and frees it or passes it on again.
 */
struct pbk_job {
    struct pbk_job *next;
    int error;         /* of the copy-up: 0 or -errno */
    unsigned n_parked; /* how often it has waited for a copy-up */
    bool was_held;     /* it found no space once */
    size_t length;
    struct fuse_in_header header;
    unsigned char body[];
};

/* One request that pyfuse3 has to answer. Owned by pending until taken. */
struct pbk_request {
    struct pbk_request *next;
    uint64_t unique;
    uint64_t nodeid;
    uint32_t opcode;
    uint32_t pid;        /* of the caller */
    struct pbk_job *job; /* parked: the answer releases it; INIT: what the kernel offered; else NULL */
};

/* The begin of the conversation. Locked by lock. */
struct pbk_opening {
    pthread_mutex_t lock;
    pthread_cond_t opened;
    bool is_open; /* requests may be read; at once, unless the connection is taken over */
    unsigned char init[sizeof(struct fuse_init_in)];
    size_t init_length;
};

/* All outstanding requests by unique. Locked by lock; n may be read without it. Grows without a limit of its own: the
 * kernel has one request outstanding for each of its callers. */
struct pbk_pending {
    pthread_mutex_t lock;
    struct pbk_request **buckets;
    size_t n_buckets; /* a power of two */
    bool is_closed;   /* nothing is added any more */
    _Atomic size_t n;
};

/* A message for the socketpair or a notification for the kernel. Owned by the list it is in. */
struct pbk_message {
    struct pbk_message *next;
    size_t length;
    unsigned char bytes[];
};

/* Forwarded requests that found the socketpair full. Locked by lock; n may be read without it. */
struct pbk_outbox {
    pthread_mutex_t lock;
    struct pbk_message *head, **tail;
    _Atomic size_t n;
};

/* Notifications for the kernel. Locked by lock. */
struct pbk_notes {
    pthread_mutex_t lock;
    pthread_cond_t wake;
    struct pbk_message *head, **tail;
    bool is_closed;
};

/*
 * Queues of the pool. Locked by lock; the counts may be read without it.
 *
 * Held are written-back pages that found no space: the kernel has taken them from their writer already, and an error would
 * only surface in an fsync, where PostgreSQL panics. The first of them is tried again every now and then; once there is
 * space for it, the others follow.
 */
struct pbk_pool {
    pthread_mutex_t lock;
    pthread_cond_t wake;
    struct pbk_job *fsync_head, **fsync_tail;
    struct pbk_job *retry_head, **retry_tail;
    struct pbk_job *held_head, **held_tail;
    uint64_t full_since_ns;    /* CLOCK_MONOTONIC, as the next two; since when there has been no space */
    uint64_t full_seen_ns;     /* when there was none for the last time */
    uint64_t held_retry_ns;    /* when the first of them is to be tried again */
    bool is_trying_held;       /* a thread does so */
    unsigned n_fsyncs_running; /* at most n_fsync, so that a thread is left for retries */
    bool is_closed;
    _Atomic size_t n_fsync_queued, n_retry_queued;
    _Atomic size_t n_held; /* all that have found no space and are not answered yet, queued or not */
};

/* A reader or a pool thread with what belongs to it alone. */
struct pbk_worker {
    struct pbk_dispatcher *dispatcher;
    pthread_t thread;
    struct pbk_ctx *ctx;
    unsigned char *buffer; /* readers: PBK_FUSE_BUFFER bytes */
    struct pbk_job *job;   /* pool: what it runs, until it is passed on; NULL in a reader */
    struct iovec iov[PBK_N_IOV];
};

/* Relaxed: nobody draws conclusions from one counter about another. */
struct pbk_counters {
    _Atomic uint64_t native[PBK_N_OPCODES], forwarded[PBK_N_OPCODES];
    _Atomic uint64_t read_bytes, write_bytes;
    _Atomic uint64_t parked, held, notified, notify_errors, reply_errors, stray_replies, socket_full;
};

/* Set before the first thread and constant after, but for the atomics, what the lists' own locks guard, and what life
 * guards: start and stop hold it all the way, the dispatcher's threads never take it. */
struct pbk_dispatcher {
    struct pbk_nodes *nodes;
    int fuse_fd;   /* borrowed */
    int log_fd;    /* borrowed, or -1 */
    int socket_fd; /* our end; pyfuse3 has a dup of peer_fd */
    int peer_fd;
    int event_fd; /* connection gone */
    int wake_fd;  /* the pump: look at the outbox */
    unsigned n_readers, n_fsync;
    int hold_s;
    bool is_supervised;
    bool is_taken_over; /* from a process that had it before */
    _Atomic bool expects_writes;

    _Atomic bool is_stopping;
    _Atomic bool is_gone;

    struct pbk_opening opening;
    struct pbk_pending pending;
    struct pbk_outbox outbox;
    struct pbk_notes notes;
    struct pbk_pool pool;
    struct pbk_counters counters;

    pthread_mutex_t life; /* guards all that follows, but for what a worker keeps in its own struct */
    bool is_started;
    bool has_pump, has_notifier;
    unsigned n_readers_running, n_pool_running;
    pthread_t pump, notifier;
    struct pbk_worker readers[PBK_MAX_READERS];
    struct pbk_worker pool_threads[PBK_MAX_POOL];
};

static inline void pbk_count(_Atomic uint64_t *counter, uint64_t n)
{
    atomic_fetch_add_explicit(counter, n, memory_order_relaxed);
}

/* dispatcher.c */
/* The connection is taken over: has the kernel send again what nobody has answered, and lets the readers begin. */
void pbk_dispatcher_open(struct pbk_dispatcher *);
/* To be called before the answer to whoever opens a file to write to it: makes the readers' buffers ready for long requests. */
void pbk_expect_writes(struct pbk_dispatcher *);
/* To be called first by a thread that moves data. */
void pbk_worker_begin(void);
void pbk_dispatcher_log(struct pbk_dispatcher *, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* Answer a request: iov[0] is overwritten by the header, n_iov counts it. error is 0 or -errno (then n_iov has to be 1).
 * True if the kernel took it. */
bool pbk_reply_iov(struct pbk_dispatcher *, uint64_t unique, int error, struct iovec *iov, int n_iov);
bool pbk_reply(struct pbk_dispatcher *, uint64_t unique, int error, const void *payload, size_t length);
/* Notes that the kernel has let go, and says so on event_fd. */
void pbk_dispatcher_gone(struct pbk_dispatcher *);

/* dispatcher_pending.c: 0, -ENOMEM or -ECONNABORTED (closed). The job passes into the table only on success. */
int pbk_pending_init(struct pbk_pending *);
void pbk_pending_destroy(struct pbk_pending *);
int pbk_pending_add(struct pbk_pending *, const struct fuse_in_header *, struct pbk_job *, uint32_t pid);
struct pbk_request *pbk_pending_take(struct pbk_pending *, uint64_t unique); /* the caller frees it; NULL: unknown */
struct pbk_request *pbk_pending_close(struct pbk_pending *); /* everything, as a list; nothing can be added any more */

/* What Python calls a request: see pbk_dispatcher_request. No two that wait at the same time are so far apart that they share it. */
static inline uint32_t pbk_token_of(uint64_t unique)
{
    /* The lowest bit is no part of the number. Source: FUSE_INT_REQ_BIT. */
    return (uint32_t)(unique >> 1);
}

/* dispatcher_reader.c */
void *pbk_reader_main(void *worker);
/* Pass a whole message on to pyfuse3, with a token in the place of the process pid; answers the kernel itself if that cannot be
 * done. job: parked with it, or NULL. */
void pbk_forward(struct pbk_dispatcher *, void *message, size_t length, struct pbk_job *job);
/* Tells pyfuse3 what the kernel said at INIT to whoever had the connection before. */
void pbk_forward_init(struct pbk_dispatcher *);
/* Does not wait. 0, or -errno if the message is lost. */
int pbk_send_to_python(struct pbk_dispatcher *, const void *message, size_t length);

/* dispatcher_hot.c: true if the request was answered (or will be), false if pyfuse3 has to. In a pool thread header and body
 * are those of worker->job, which is NULL afterwards if the request has to wait again. */
bool pbk_answer_hot(struct pbk_worker *, const struct fuse_in_header *, const unsigned char *body, size_t length);
/* Has Python register the file of a request before that is tried again: after a takeover the kernel uses files that nobody has
 * opened here. In a pool thread the request is worker->job, which is given away. */
void pbk_park_for_open(struct pbk_worker *, const struct fuse_in_header *, const unsigned char *body, size_t length);

/* dispatcher_pool.c */
struct pbk_job *pbk_job_new(const struct fuse_in_header *, const unsigned char *body, size_t length);
void pbk_pool_push_fsync(struct pbk_dispatcher *, struct pbk_job *);
void pbk_pool_push_retry(struct pbk_dispatcher *, struct pbk_job *);
/* Takes over a request that found no space, to try it again; false if it has waited long enough: then it is the caller's. */
bool pbk_pool_hold(struct pbk_dispatcher *, struct pbk_job *);
void *pbk_pool_main(void *worker);

/* dispatcher_pump.c */
void *pbk_pump_main(void *dispatcher);
void *pbk_notifier_main(void *dispatcher);
struct pbk_message *pbk_message_new(size_t length);
int pbk_notes_push(struct pbk_dispatcher *, struct pbk_message *); /* takes the message over; 0 or -ENOTCONN */
void pbk_outbox_push(struct pbk_dispatcher *, struct pbk_message *);

#endif

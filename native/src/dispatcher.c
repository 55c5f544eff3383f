/*
 * The dispatcher's life: made, started, stopped, freed, each by one thread at a time; and what its threads share: answers
 * to the kernel, the log, the counters.
 */
#define _GNU_SOURCE
#include "dispatcher_internal.h"

#include <errno.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <unistd.h>

/* Since Linux 5.14, later than some libraries. */
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

/* No request but a write is longer, or matters. */
#define SMALL_REQUEST 16384

#define MIN_READERS 4u
#define DEFAULT_FSYNC 4u

/* Of the socketpair, where allowed: about 4,000 waiting requests. */
#define SOCKET_BUFFER (4 << 20)

void pbk_dispatcher_log(struct pbk_dispatcher *d, const char *format, ...)
{
    if (d->log_fd < 0)
        return;
    char line[512];
    va_list args;
    va_start(args, format);
    int n = vsnprintf(line, sizeof line - 1, format, args);
    va_end(args);
    if (n < 0)
        return;
    size_t length = (size_t)n < sizeof line - 1 ? (size_t)n : sizeof line - 2;
    line[length++] = '\n';
    ssize_t written = write(d->log_fd, line, length); /* a full log must not stop a mount */
    (void)written;
}

void pbk_worker_begin(void)
{
    /*
     * Linux 5.6, CAP_SYS_RESOURCE; without it all works, slower under pressure. The pages that this thread makes dirty are
     * those of the mount, written down one floor below: without the flag it would be slowed down for being over the limit
     * together with the program whose pages it is about to clean, and could wait for memory that only itself can free.
     */
    prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0);
}

bool pbk_reply_iov(struct pbk_dispatcher *d, uint64_t unique, int error, struct iovec *iov, int n_iov)
{
    struct fuse_out_header header = {.error = pbk_fuse_error(error), .unique = unique};
    size_t length = sizeof header;
    for (int i = 1; i < n_iov; i++)
        length += iov[i].iov_len;
    header.len = (uint32_t)length;
    iov[0] = (struct iovec){.iov_base = &header, .iov_len = sizeof header};

    ssize_t written;
    do
        written = writev(d->fuse_fd, iov, n_iov);
    while (written < 0 && errno == EINTR);
    if (written >= 0)
        return true;
    /* ENOENT: the caller is gone. ENODEV: the mount is. */
    if (errno == ENOENT || errno == ENODEV)
        return false;
    pbk_count(&d->counters.reply_errors, 1);
    if (!atomic_load(&d->is_stopping))
        pbk_dispatcher_log(d, "dispatcher: the kernel refused an answer: %s", strerror(errno));
    /* Better an error than a caller that waits for ever. */
    if (n_iov > 1) {
        header.error = -EIO;
        header.len = sizeof header;
        written = write(d->fuse_fd, &header, sizeof header);
    }
    return false;
}

bool pbk_reply(struct pbk_dispatcher *d, uint64_t unique, int error, const void *payload, size_t length)
{
    struct iovec iov[2] = {{.iov_base = NULL, .iov_len = 0},
                           {.iov_base = (void *)(uintptr_t)payload, .iov_len = length}};
    return pbk_reply_iov(d, unique, error, iov, length > 0 && !error ? 2 : 1);
}

void pbk_dispatcher_gone(struct pbk_dispatcher *d)
{
    if (atomic_exchange(&d->is_gone, true))
        return;
    uint64_t one = 1;
    ssize_t written = write(d->event_fd, &one, sizeof one);
    (void)written;
}

void pbk_dispatcher_open(struct pbk_dispatcher *d)
{
    struct fuse_out_header resend = {.len = sizeof resend, .error = PBK_FUSE_NOTIFY_RESEND, .unique = 0};
    ssize_t written;
    do
        written = write(d->fuse_fd, &resend, sizeof resend);
    while (written < 0 && errno == EINTR);
    if (written < 0) {
        /* Whoever waits for an answer would wait for ever. */
        pbk_dispatcher_log(d, "dispatcher: the kernel does not send again: %s", strerror(errno));
        pbk_dispatcher_gone(d);
        return;
    }
    pthread_mutex_lock(&d->opening.lock);
    d->opening.is_open = true;
    pthread_cond_broadcast(&d->opening.opened);
    pthread_mutex_unlock(&d->opening.lock);
}

size_t pbk_dispatcher_init_request(struct pbk_dispatcher *d, void *to, size_t room)
{
    pthread_mutex_lock(&d->opening.lock);
    size_t length = d->opening.init_length;
    memcpy(to, d->opening.init, length < room ? length : room);
    pthread_mutex_unlock(&d->opening.lock);
    return length;
}

size_t pbk_dispatcher_init_answer(const void *request, size_t length, void *to, size_t room)
{
    struct fuse_init_in in;
    struct fuse_init_out out;
    memset(&in, 0, sizeof in);
    memcpy(&in, request, length < sizeof in ? length : sizeof in);
    pbk_fuse_init_reply(&in, length, &out);
    memcpy(to, &out, sizeof out < room ? sizeof out : room);
    return sizeof out;
}

int pbk_dispatcher_is_known(struct pbk_dispatcher *d, uint64_t ino)
{
    struct {
        struct fuse_out_header header;
        struct fuse_notify_inval_inode_out out;
    } message = {
        .header = {.len = sizeof message, .error = FUSE_NOTIFY_INVAL_INODE, .unique = 0},
        .out = {.ino = ino, .off = -1, .len = 0},
    };
    ssize_t written;
    do
        written = write(d->fuse_fd, &message, sizeof message);
    while (written < 0 && errno == EINTR);
    return written >= 0 ? 1 : errno == ENOENT ? 0 : -errno;
}

static unsigned default_readers(void)
{
    long cores = sysconf(_SC_NPROCESSORS_ONLN);
    unsigned n = cores > 0 && cores < (long)PBK_MAX_READERS ? 2u * (unsigned)cores : PBK_MAX_READERS;
    return n < MIN_READERS ? MIN_READERS : n > PBK_MAX_READERS ? PBK_MAX_READERS : n;
}

static void raise_buffer(int fd)
{
    int bytes = SOCKET_BUFFER;
    if (setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &bytes, sizeof bytes) < 0)
        setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &bytes, sizeof bytes); /* then as much as net.core.wmem_max allows */
}

static void close_fd(int fd)
{
    if (fd >= 0)
        close(fd);
}

static int init_lists(struct pbk_dispatcher *d)
{
    int error = pbk_pending_init(&d->pending);
    if (error)
        return error;
    /* These cannot fail with default attributes. Source: glibc, nptl. */
    pthread_mutex_init(&d->life, NULL);
    pthread_mutex_init(&d->opening.lock, NULL);
    pthread_cond_init(&d->opening.opened, NULL);
    pthread_mutex_init(&d->outbox.lock, NULL);
    pthread_mutex_init(&d->notes.lock, NULL);
    pthread_cond_init(&d->notes.wake, NULL);
    pthread_mutex_init(&d->pool.lock, NULL);
    pthread_cond_init(&d->pool.wake, NULL);
    d->outbox.tail = &d->outbox.head;
    d->notes.tail = &d->notes.head;
    d->notes.is_closed = true; /* until started */
    d->pool.fsync_tail = &d->pool.fsync_head;
    d->pool.retry_tail = &d->pool.retry_head;
    d->pool.held_tail = &d->pool.held_head;
    return 0;
}

int pbk_dispatcher_new(struct pbk_nodes *nodes, int fuse_fd, const struct pbk_dispatcher_options *options,
                       struct pbk_dispatcher **made)
{
    struct pbk_dispatcher *d = calloc(1, sizeof *d);
    if (!d)
        return -ENOMEM;
    int error = init_lists(d);
    if (error) {
        free(d);
        return error;
    }
    d->nodes = nodes;
    d->fuse_fd = fuse_fd;
    d->log_fd = options->log_fd;
    d->n_readers = options->n_readers ? options->n_readers : default_readers();
    if (d->n_readers > PBK_MAX_READERS)
        d->n_readers = PBK_MAX_READERS;
    d->n_fsync = options->n_fsync ? options->n_fsync : DEFAULT_FSYNC;
    if (d->n_fsync > PBK_MAX_POOL - 1)
        d->n_fsync = PBK_MAX_POOL - 1;
    d->hold_s = options->hold_s;
    d->is_supervised = options->is_supervised;
    d->is_taken_over = options->init_length > 0;
    d->opening.is_open = !d->is_taken_over;
    d->opening.init_length =
        options->init_length < sizeof d->opening.init ? options->init_length : sizeof d->opening.init;
    if (d->is_taken_over)
        memcpy(d->opening.init, options->init, d->opening.init_length);

    int pair[2] = {-1, -1};
    d->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    error = d->event_fd < 0 ? -errno : 0;
    d->wake_fd = error ? -1 : eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (!error && d->wake_fd < 0)
        error = -errno;
    if (!error && socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) < 0)
        error = -errno;
    d->socket_fd = pair[0];
    d->peer_fd = pair[1];
    if (error) {
        pbk_dispatcher_free(d);
        return error;
    }
    raise_buffer(d->socket_fd);
    raise_buffer(d->peer_fd);
    *made = d;
    return 0;
}

/*
 * The kernel copies requests into this buffer. Were a page of it missing when the process is killed, the copy would fail, and
 * with it the request of somebody who shall not notice. So the pages are there before, no fork write-protects them, and no
 * huge page takes their place; that they are locked is not allowed to everybody, and without swap it makes no difference. But
 * only a write needs more than the first few, and these are megabytes: see pbk_expect_writes.
 */
static void keep_present(struct pbk_worker *worker, size_t length)
{
    madvise(worker->buffer, length, MADV_POPULATE_WRITE);
    mlock(worker->buffer, length);
}

void pbk_expect_writes(struct pbk_dispatcher *d)
{
    if (!d->is_supervised || atomic_load_explicit(&d->expects_writes, memory_order_relaxed))
        return;
    pthread_mutex_lock(&d->opening.lock);
    if (!atomic_load(&d->expects_writes)) {
        for (unsigned i = 0; i < d->n_readers; i++)
            keep_present(&d->readers[i], PBK_FUSE_BUFFER);
        atomic_store(&d->expects_writes, true);
    }
    pthread_mutex_unlock(&d->opening.lock);
}

static int map_buffer(struct pbk_dispatcher *d, struct pbk_worker *worker)
{
    void *buffer = mmap(NULL, PBK_FUSE_BUFFER, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (buffer == MAP_FAILED)
        return -errno;
    worker->buffer = buffer;
    madvise(buffer, PBK_FUSE_BUFFER, MADV_DONTFORK);
    if (d->is_supervised) {
        madvise(buffer, PBK_FUSE_BUFFER, MADV_NOHUGEPAGE);
        keep_present(worker, SMALL_REQUEST);
    }
    return 0;
}

static int worker_init(struct pbk_dispatcher *d, struct pbk_worker *worker, bool is_reader)
{
    worker->dispatcher = d;
    worker->ctx = pbk_ctx_new(PBK_FUSE_MAX_IO);
    if (!worker->ctx)
        return -ENOMEM;
    return is_reader ? map_buffer(d, worker) : 0;
}

static void worker_destroy(struct pbk_worker *worker)
{
    if (worker->ctx)
        pbk_ctx_free(worker->ctx);
    if (worker->buffer)
        munmap(worker->buffer, PBK_FUSE_BUFFER);
    worker->ctx = NULL;
    worker->buffer = NULL;
}

static int start_threads(struct pbk_dispatcher *d)
{
    int error = pthread_create(&d->pump, NULL, pbk_pump_main, d);
    if (error)
        return -error;
    d->has_pump = true;
    pthread_setname_np(d->pump, "pbk-pump");
    if ((error = pthread_create(&d->notifier, NULL, pbk_notifier_main, d)))
        return -error;
    d->has_notifier = true;
    pthread_setname_np(d->notifier, "pbk-notify");
    for (unsigned i = 0; i < d->n_fsync + 1; i++) {
        struct pbk_worker *worker = &d->pool_threads[i];
        if ((error = -worker_init(d, worker, false)) ||
            (error = pthread_create(&worker->thread, NULL, pbk_pool_main, worker)))
            return -error;
        d->n_pool_running++;
        pthread_setname_np(worker->thread, "pbk-pool");
    }
    for (unsigned i = 0; i < d->n_readers; i++)
        if ((error = worker_init(d, &d->readers[i], true)))
            return error;
    if (d->is_taken_over)
        pbk_expect_writes(d);
    for (unsigned i = 0; i < d->n_readers; i++) {
        struct pbk_worker *worker = &d->readers[i];
        if ((error = pthread_create(&worker->thread, NULL, pbk_reader_main, worker)))
            return -error;
        d->n_readers_running++;
        pthread_setname_np(worker->thread, "pbk-reader");
    }
    return 0;
}

static void stop_all(struct pbk_dispatcher *);

int pbk_dispatcher_start(struct pbk_dispatcher *d)
{
    pthread_mutex_lock(&d->life);
    if (d->is_started) {
        pthread_mutex_unlock(&d->life);
        return -EALREADY;
    }
    d->is_started = true;
    pthread_mutex_lock(&d->notes.lock);
    d->notes.is_closed = false;
    pthread_mutex_unlock(&d->notes.lock);

    /* Signals are the interpreter's. */
    sigset_t all, before;
    sigfillset(&all);
    int error = -pthread_sigmask(SIG_SETMASK, &all, &before);
    if (!error) {
        error = start_threads(d);
        pthread_sigmask(SIG_SETMASK, &before, NULL);
    }
    if (error)
        stop_all(d);
    else if (d->is_taken_over)
        pbk_forward_init(d);
    pthread_mutex_unlock(&d->life);
    return error;
}

static void stop_notifier(struct pbk_dispatcher *d)
{
    pthread_mutex_lock(&d->notes.lock);
    d->notes.is_closed = true;
    struct pbk_message *note = d->notes.head;
    d->notes.head = NULL;
    d->notes.tail = &d->notes.head;
    pthread_cond_signal(&d->notes.wake);
    pthread_mutex_unlock(&d->notes.lock);
    for (struct pbk_message *next; note; note = next) {
        next = note->next;
        free(note);
    }
    if (d->has_notifier)
        pthread_join(d->notifier, NULL);
    d->has_notifier = false;
}

static void stop_readers(struct pbk_dispatcher *d)
{
    atomic_store(&d->is_stopping, true);
    pthread_mutex_lock(&d->opening.lock);
    pthread_cond_broadcast(&d->opening.opened);
    pthread_mutex_unlock(&d->opening.lock);
    for (unsigned i = 0; i < d->n_readers_running; i++)
        pthread_cancel(d->readers[i].thread);
    for (unsigned i = 0; i < d->n_readers_running; i++)
        pthread_join(d->readers[i].thread, NULL);
    d->n_readers_running = 0;
}

static void free_jobs(struct pbk_job *job)
{
    for (struct pbk_job *next; job; job = next) {
        next = job->next;
        free(job);
    }
}

static void stop_pool(struct pbk_dispatcher *d)
{
    struct pbk_pool *pool = &d->pool;
    pthread_mutex_lock(&pool->lock);
    pool->is_closed = true;
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->lock);
    for (unsigned i = 0; i < d->n_pool_running; i++)
        pthread_join(d->pool_threads[i].thread, NULL);
    d->n_pool_running = 0;
    free_jobs(pool->fsync_head);
    free_jobs(pool->retry_head);
    free_jobs(pool->held_head);
    pool->fsync_head = pool->retry_head = pool->held_head = NULL;
    pool->fsync_tail = &pool->fsync_head;
    pool->retry_tail = &pool->retry_head;
    pool->held_tail = &pool->held_head;
    atomic_store(&pool->n_fsync_queued, 0);
    atomic_store(&pool->n_retry_queued, 0);
    atomic_store(&pool->n_held, 0);
}

static void stop_pump(struct pbk_dispatcher *d)
{
    if (d->has_pump) {
        shutdown(d->socket_fd, SHUT_RDWR);
        pthread_join(d->pump, NULL);
    }
    d->has_pump = false;
    for (struct pbk_message *message = d->outbox.head, *next; message; message = next) {
        next = message->next;
        free(message);
    }
    d->outbox.head = NULL;
    d->outbox.tail = &d->outbox.head;
    atomic_store(&d->outbox.n, 0);
}

/* Under life; may be called again. A stopped dispatcher stays started: it is not started a second time. */
static void stop_all(struct pbk_dispatcher *d)
{
    /*
     * Python may be gone, so what it owes is failed first. The notifier may sit in the kernel until a page is written, for
     * which readers and pool have to be there still.
     */
    for (struct pbk_request *request = pbk_pending_close(&d->pending), *next; request; request = next) {
        next = request->next;
        pbk_reply(d, request->unique, -EIO, NULL, 0);
        free(request->job);
        free(request);
    }
    stop_notifier(d);
    stop_readers(d);
    stop_pool(d);
    stop_pump(d);
    for (unsigned i = 0; i < PBK_MAX_READERS; i++)
        worker_destroy(&d->readers[i]);
    for (unsigned i = 0; i < PBK_MAX_POOL; i++)
        worker_destroy(&d->pool_threads[i]);
}

void pbk_dispatcher_stop(struct pbk_dispatcher *d)
{
    pthread_mutex_lock(&d->life);
    if (d->is_started)
        stop_all(d);
    pthread_mutex_unlock(&d->life);
}

void pbk_dispatcher_free(struct pbk_dispatcher *d)
{
    if (!d)
        return;
    pbk_dispatcher_stop(d);
    close_fd(d->event_fd);
    close_fd(d->wake_fd);
    close_fd(d->socket_fd);
    close_fd(d->peer_fd);
    pbk_pending_destroy(&d->pending);
    pthread_mutex_destroy(&d->life);
    pthread_mutex_destroy(&d->opening.lock);
    pthread_cond_destroy(&d->opening.opened);
    pthread_mutex_destroy(&d->outbox.lock);
    pthread_mutex_destroy(&d->notes.lock);
    pthread_cond_destroy(&d->notes.wake);
    pthread_mutex_destroy(&d->pool.lock);
    pthread_cond_destroy(&d->pool.wake);
    free(d);
}

int pbk_dispatcher_socket_fd(const struct pbk_dispatcher *d)
{
    return d->peer_fd;
}

int pbk_dispatcher_event_fd(const struct pbk_dispatcher *d)
{
    return d->event_fd;
}

int pbk_dispatcher_invalidate(struct pbk_dispatcher *d, uint64_t ino, int64_t offset, int64_t length)
{
    struct {
        struct fuse_out_header header;
        struct fuse_notify_inval_inode_out out;
    } message = {
        .header = {.len = sizeof message, .error = FUSE_NOTIFY_INVAL_INODE, .unique = 0},
        .out = {.ino = ino, .off = offset, .len = length},
    };
    struct pbk_message *note = pbk_message_new(sizeof message);
    if (!note)
        return -ENOMEM;
    memcpy(note->bytes, &message, sizeof message);
    return pbk_notes_push(d, note);
}

int pbk_dispatcher_invalidate_entry(struct pbk_dispatcher *d, uint64_t parent, const void *name, size_t length)
{
    struct {
        struct fuse_out_header header;
        struct fuse_notify_inval_entry_out out;
    } message;
    if (length > 1024) /* Source: FUSE_NAME_MAX */
        return -ENAMETOOLONG;
    size_t total = sizeof message + length + 1; /* with its terminating zero */
    message.header = (struct fuse_out_header){.len = (uint32_t)total, .error = FUSE_NOTIFY_INVAL_ENTRY, .unique = 0};
    message.out = (struct fuse_notify_inval_entry_out){.parent = parent, .namelen = (uint32_t)length, .flags = 0};
    struct pbk_message *note = pbk_message_new(total);
    if (!note)
        return -ENOMEM;
    memcpy(note->bytes, &message, sizeof message);
    memcpy(note->bytes + sizeof message, name, length);
    note->bytes[total - 1] = 0;
    return pbk_notes_push(d, note);
}

static uint64_t get(const _Atomic uint64_t *counter)
{
    return atomic_load_explicit(counter, memory_order_relaxed);
}

void pbk_dispatcher_counters(struct pbk_dispatcher *d, void (*visit)(void *arg, const char *name, uint64_t value),
                             void *arg)
{
    const struct pbk_counters *c = &d->counters;
    char name[64];
    uint64_t others = 0;
    for (uint32_t opcode = 0; opcode < PBK_N_OPCODES; opcode++) {
        const char *opcode_name = pbk_fuse_opcode_name(opcode);
        uint64_t n_native = get(&c->native[opcode]), n_forwarded = get(&c->forwarded[opcode]);
        if (!opcode_name) {
            others += n_native + n_forwarded;
            continue;
        }
        if (n_native) {
            snprintf(name, sizeof name, "%s.native", opcode_name);
            visit(arg, name, n_native);
        }
        if (n_forwarded) {
            snprintf(name, sizeof name, "%s.forwarded", opcode_name);
            visit(arg, name, n_forwarded);
        }
    }
    visit(arg, "other_requests", others);
    visit(arg, "read_bytes", get(&c->read_bytes));
    visit(arg, "write_bytes", get(&c->write_bytes));
    visit(arg, "copy_up_waits", get(&c->parked));
    visit(arg, "held", get(&c->held));
    visit(arg, "notified", get(&c->notified));
    visit(arg, "notify_errors", get(&c->notify_errors));
    visit(arg, "reply_errors", get(&c->reply_errors));
    visit(arg, "stray_replies", get(&c->stray_replies));
    visit(arg, "socket_full", get(&c->socket_full));
    visit(arg, "outstanding", atomic_load_explicit(&d->pending.n, memory_order_relaxed));
    visit(arg, "outbox", atomic_load_explicit(&d->outbox.n, memory_order_relaxed));
    visit(arg, "fsync_queue", atomic_load_explicit(&d->pool.n_fsync_queued, memory_order_relaxed));
    visit(arg, "retry_queue", atomic_load_explicit(&d->pool.n_retry_queued, memory_order_relaxed));
    visit(arg, "waiting_for_space", atomic_load_explicit(&d->pool.n_held, memory_order_relaxed));
    visit(arg, "readers", d->n_readers);
}

void pbk_dispatcher_reset_counters(struct pbk_dispatcher *d)
{
    struct pbk_counters *c = &d->counters;
    _Atomic uint64_t *single[] = {&c->read_bytes,    &c->write_bytes,  &c->parked,        &c->held,       &c->notified,
                                  &c->notify_errors, &c->reply_errors, &c->stray_replies, &c->socket_full};
    for (uint32_t opcode = 0; opcode < PBK_N_OPCODES; opcode++) {
        atomic_store_explicit(&c->native[opcode], 0, memory_order_relaxed);
        atomic_store_explicit(&c->forwarded[opcode], 0, memory_order_relaxed);
    }
    for (size_t i = 0; i < sizeof single / sizeof single[0]; i++)
        atomic_store_explicit(single[i], 0, memory_order_relaxed);
}

/*
 * The readers: take one request at a time from the kernel, answer it or pass it on. They wait for the kernel and for the
 * disk, never for Python.
 */
#define _GNU_SOURCE
#include "dispatcher_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

/* libfuse moves data through pipes from minor 14 on; with 13 it reads and writes plainly, and what pyfuse3 needs is all
 * older. The kernel never sees this number: the pump writes the answer to INIT. */
#define MINOR_FOR_PYTHON 13u

/* One answer of READDIR has to fit into the socketpair's buffer, whose size an unprivileged user cannot raise
 * (net.core.wmem_max, 208 KiB). It is also what Python lists in one go, while everything else waits for it. */
#define READDIR_MAX (64u << 10)

/* Same for one message of forgets; the kernel packs as many as fit into a reader's buffer (65 thousand). */
#define FORGETS_MAX 1024u

int pbk_send_to_python(struct pbk_dispatcher *d, const void *message, size_t length)
{
    /* What waits in the outbox goes first, or a busy Python would serve the newest request first. */
    if (atomic_load_explicit(&d->outbox.n, memory_order_relaxed) == 0) {
        ssize_t sent;
        do
            sent = send(d->socket_fd, message, length, MSG_DONTWAIT | MSG_NOSIGNAL);
        while (sent < 0 && errno == EINTR);
        if (sent >= 0)
            return 0;
        if (errno != EAGAIN && errno != ENOBUFS)
            return -errno;
        pbk_count(&d->counters.socket_full, 1);
    }
    struct pbk_message *copy = pbk_message_new(length);
    if (!copy)
        return -ENOMEM;
    memcpy(copy->bytes, message, length);
    pbk_outbox_push(d, copy);
    return 0;
}

void pbk_forward(struct pbk_dispatcher *d, void *message, size_t length, struct pbk_job *job)
{
    struct fuse_in_header header;
    memcpy(&header, message, sizeof header);
    uint32_t pid = header.pid;
    header.pid = pbk_token_of(header.unique);
    memcpy(message, &header, sizeof header);
    int error = pbk_pending_add(&d->pending, &header, job, pid);
    if (error) {
        free(job);
    } else if ((error = pbk_send_to_python(d, message, length))) {
        struct pbk_request *request = pbk_pending_take(&d->pending, header.unique);
        if (!request)
            return; /* the stopping dispatcher has answered it */
        free(request->job);
        free(request);
    }
    if (error) {
        if (!atomic_load(&d->is_stopping))
            pbk_dispatcher_log(d, "dispatcher: request %u not passed on: %s", header.opcode, strerror(-error));
        pbk_reply(d, header.unique, error == -ENOMEM ? error : -EIO, NULL, 0);
    }
}

/* A forget is never answered; one that is lost keeps a name in memory, no more. */
static void forward_forgets(struct pbk_dispatcher *d, const struct fuse_in_header *header, const unsigned char *body,
                            size_t length)
{
    struct {
        struct fuse_in_header header;
        struct fuse_batch_forget_in batch;
        struct fuse_forget_one forgets[FORGETS_MAX];
    } message;
    struct fuse_batch_forget_in batch;
    if (length < sizeof batch)
        return;
    memcpy(&batch, body, sizeof batch);
    body += sizeof batch;
    length -= sizeof batch;
    if (batch.count > length / sizeof message.forgets[0])
        return;
    while (batch.count > 0) {
        uint32_t n = batch.count < FORGETS_MAX ? batch.count : FORGETS_MAX;
        size_t bytes = n * sizeof message.forgets[0];
        message.header = *header;
        message.header.len = (uint32_t)(sizeof message.header + sizeof message.batch + bytes);
        message.batch = (struct fuse_batch_forget_in){.count = n};
        memcpy(message.forgets, body, bytes);
        pbk_send_to_python(d, &message, message.header.len);
        body += bytes;
        batch.count -= n;
    }
}

static void forward_init(struct pbk_dispatcher *d, const struct fuse_in_header *header, unsigned char *message,
                         size_t length)
{
    unsigned char *body = message + sizeof *header;
    size_t body_length = length - sizeof *header;
    struct fuse_init_in in;
    memset(&in, 0, sizeof in);
    memcpy(&in, body, body_length < sizeof in ? body_length : sizeof in);
    if (in.major != PBK_FUSE_MAJOR) {
        /* libfuse says which one it speaks, and the kernel asks again. */
        pbk_forward(d, message, length, NULL);
        return;
    }
    /* The kernel's own words are kept for the answer. */
    struct pbk_job *offered = pbk_job_new(header, body, body_length);
    if (!offered) {
        pbk_reply(d, header->unique, -ENOMEM, NULL, 0);
        return;
    }
    if (in.minor > MINOR_FOR_PYTHON && body_length >= offsetof(struct fuse_init_in, max_readahead)) {
        in.minor = MINOR_FOR_PYTHON;
        memcpy(body + offsetof(struct fuse_init_in, minor), &in.minor, sizeof in.minor);
    }
    pbk_forward(d, message, length, offered);
}

void pbk_forward_init(struct pbk_dispatcher *d)
{
    /* Numbers of requests are even. Source: FUSE_REQ_ID_STEP. */
    struct fuse_in_header header = {.opcode = FUSE_INIT, .unique = 1};
    unsigned char message[sizeof header + sizeof d->opening.init];
    header.len = (uint32_t)(sizeof header + d->opening.init_length);
    memcpy(message, &header, sizeof header);
    memcpy(message + sizeof header, d->opening.init, d->opening.init_length);
    forward_init(d, &header, message, header.len);
}

/* Notes what the kernel says, for whoever takes over from this process. */
static void keep_init(struct pbk_dispatcher *d, const unsigned char *body, size_t length)
{
    struct pbk_opening *opening = &d->opening;
    pthread_mutex_lock(&opening->lock);
    opening->init_length = length < sizeof opening->init ? length : sizeof opening->init;
    memcpy(opening->init, body, opening->init_length);
    pthread_mutex_unlock(&opening->lock);
}

/* Passes on what pbk_answer_hot left, changed where the socketpair or libfuse wants it smaller. */
static void forward_cold(struct pbk_dispatcher *d, struct fuse_in_header *header, unsigned char *message, size_t length)
{
    unsigned char *body = message + sizeof *header;
    size_t body_length = length - sizeof *header;
    switch (header->opcode) {
    case FUSE_FORGET:
        pbk_send_to_python(d, message, length);
        return;
    case FUSE_BATCH_FORGET:
        forward_forgets(d, header, body, body_length);
        return;
    case FUSE_READDIR:
    case FUSE_READDIRPLUS: {
        struct fuse_read_in in;
        if (body_length >= sizeof in) {
            memcpy(&in, body, sizeof in);
            in.fh = header->nodeid;
            if (in.size > READDIR_MAX)
                in.size = READDIR_MAX;
            memcpy(body, &in, sizeof in);
        }
        break;
    }
    case FUSE_INIT:
        keep_init(d, body, body_length);
        forward_init(d, header, message, length);
        return;
    default:
        break;
    }
    pbk_forward(d, message, length, NULL);
}

static bool opens_to_write(const struct fuse_in_header *header, const unsigned char *body)
{
    struct fuse_open_in in;
    if (header->opcode != FUSE_OPEN || header->len < sizeof *header + sizeof in)
        return header->opcode == FUSE_CREATE;
    memcpy(&in, body, sizeof in);
    return (in.flags & O_ACCMODE) != O_RDONLY;
}

static void take_request(struct pbk_worker *worker, size_t length)
{
    struct pbk_dispatcher *d = worker->dispatcher;
    struct fuse_in_header header;
    if (length < sizeof header) {
        pbk_dispatcher_log(d, "dispatcher: the kernel sent %zu bytes", length);
        return;
    }
    memcpy(&header, worker->buffer, sizeof header);
    if (header.len != length) {
        pbk_dispatcher_log(d, "dispatcher: the kernel sent %zu bytes that say to be %u", length, header.len);
        pbk_reply(d, header.unique, -EIO, NULL, 0);
        return;
    }
    if (opens_to_write(&header, worker->buffer + sizeof header))
        pbk_expect_writes(d);
    uint32_t slot = header.opcode < PBK_N_OPCODES ? header.opcode : 0;
    if (pbk_answer_hot(worker, &header, worker->buffer + sizeof header, length - sizeof header)) {
        pbk_count(&d->counters.native[slot], 1);
    } else {
        pbk_count(&d->counters.forwarded[slot], 1);
        forward_cold(d, &header, worker->buffer, length);
    }
}

/* Whoever takes over a connection must not read before the kernel has been asked to send again: it would send again what has
 * just been read, too. */
static void wait_until_open(struct pbk_dispatcher *d)
{
    struct pbk_opening *opening = &d->opening;
    pthread_mutex_lock(&opening->lock);
    while (!opening->is_open && !atomic_load(&d->is_stopping))
        pthread_cond_wait(&opening->opened, &opening->lock);
    pthread_mutex_unlock(&opening->lock);
}

void *pbk_reader_main(void *arg)
{
    struct pbk_worker *worker = arg;
    struct pbk_dispatcher *d = worker->dispatcher;
    pbk_worker_begin();
    int state;
    pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &state);
    wait_until_open(d);
    while (!atomic_load_explicit(&d->is_stopping, memory_order_relaxed)) {
        /* The only place where stop may end this thread: it owns nothing here, and a request that is lost in it is failed
         * by the kernel when the descriptor is closed. A read with a time limit would cost every request a system call,
         * and poll() would wake every reader for each one. */
        pthread_setcancelstate(PTHREAD_CANCEL_ENABLE, &state);
        ssize_t got = read(d->fuse_fd, worker->buffer, PBK_FUSE_BUFFER);
        int error = errno;
        pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &state);
        if (got > 0) {
            take_request(worker, (size_t)got);
        } else if (got == 0 || (error != EINTR && error != EAGAIN && error != ENOENT)) {
            /* ENOENT: the request was aborted while it was read. ENODEV: unmounted or aborted. */
            if (got < 0 && error != ENODEV)
                pbk_dispatcher_log(d, "dispatcher: cannot read requests: %s", strerror(error));
            pbk_dispatcher_gone(d);
            break;
        }
    }
    return NULL;
}

/*
 * The pump carries pyfuse3's answers to the kernel and, when the socketpair was full, requests to pyfuse3. The notifier
 * writes invalidations: the kernel may let such a write wait for a page that a reader has to write back first, so neither a
 * reader nor the pump may do it.
 */
#define _GNU_SOURCE
#include "dispatcher_internal.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

struct pbk_message *pbk_message_new(size_t length)
{
    struct pbk_message *message = malloc(sizeof *message + length);
    if (message) {
        message->next = NULL;
        message->length = length;
    }
    return message;
}

void pbk_outbox_push(struct pbk_dispatcher *d, struct pbk_message *message)
{
    struct pbk_outbox *outbox = &d->outbox;
    pthread_mutex_lock(&outbox->lock);
    *outbox->tail = message;
    outbox->tail = &message->next;
    atomic_fetch_add_explicit(&outbox->n, 1, memory_order_relaxed);
    pthread_mutex_unlock(&outbox->lock);
    uint64_t one = 1;
    ssize_t written = write(d->wake_fd, &one, sizeof one); /* fails only if it is readable as it is */
    (void)written;
}

/* Sends what the outbox holds, until the socketpair is full again. Only the pump takes messages out. */
static void drain_outbox(struct pbk_dispatcher *d)
{
    struct pbk_outbox *outbox = &d->outbox;
    for (;;) {
        pthread_mutex_lock(&outbox->lock);
        struct pbk_message *message = outbox->head;
        pthread_mutex_unlock(&outbox->lock);
        if (!message)
            return;
        if (send(d->socket_fd, message->bytes, message->length, MSG_DONTWAIT | MSG_NOSIGNAL) < 0) {
            if (errno == EAGAIN || errno == ENOBUFS)
                return;
            if (errno == EINTR)
                continue;
            struct fuse_in_header header;
            memcpy(&header, message->bytes, sizeof header);
            pbk_dispatcher_log(d, "dispatcher: request %u lost on its way to python: %s", header.opcode,
                               strerror(errno));
            struct pbk_request *request = pbk_pending_take(&d->pending, header.unique);
            if (request) {
                pbk_reply(d, header.unique, -EIO, NULL, 0);
                free(request->job);
                free(request);
            }
        }
        pthread_mutex_lock(&outbox->lock);
        outbox->head = message->next;
        if (!outbox->head)
            outbox->tail = &outbox->head;
        atomic_fetch_sub_explicit(&outbox->n, 1, memory_order_relaxed);
        pthread_mutex_unlock(&outbox->lock);
        free(message);
    }
}

/* Passes a whole message to the kernel as it is. */
static bool pass_on(struct pbk_dispatcher *d, const struct fuse_out_header *header, const unsigned char *message,
                    size_t length)
{
    struct iovec iov[2] = {
        {.iov_base = NULL, .iov_len = 0},
        {.iov_base = (void *)(uintptr_t)(message + sizeof *header), .iov_len = length - sizeof *header}};
    return pbk_reply_iov(d, header->unique, header->error, iov, header->error || length == sizeof *header ? 1 : 2);
}

static void answer_open(struct pbk_dispatcher *d, uint64_t unique, uint64_t ino, struct fuse_entry_out *entry)
{
    struct fuse_open_out out = {.fh = ino, .open_flags = FOPEN_KEEP_CACHE};
    struct iovec iov[3] = {{.iov_base = NULL, .iov_len = 0}};
    int n = 1;
    if (entry)
        iov[n++] = (struct iovec){.iov_base = entry, .iov_len = sizeof *entry};
    iov[n++] = (struct iovec){.iov_base = &out, .iov_len = sizeof out};

    /* Counted before the kernel knows: its RELEASE may come while we are still here. */
    struct pbk_node *node = pbk_nodes_get(d->nodes, ino);
    if (!node) {
        pbk_dispatcher_log(d, "dispatcher: inode %llu was opened without a node", (unsigned long long)ino);
        pbk_reply(d, unique, -EIO, NULL, 0);
        return;
    }
    pbk_node_opened(node);
    if (!pbk_reply_iov(d, unique, 0, iov, n))
        pbk_node_released(node);
    pbk_node_put(node);
}

/* What pyfuse3 answered: message[0 .. length) starts with a header that is checked here. */
static void take_answer(struct pbk_dispatcher *d, unsigned char *message, size_t length)
{
    struct fuse_out_header header;
    if (length < sizeof header)
        goto stray;
    memcpy(&header, message, sizeof header);
    bool is_whole = header.len == length;
    const unsigned char *body = message + sizeof header;
    size_t body_length = length - sizeof header;

    if (header.unique == 0) {
        struct pbk_message *note = is_whole ? pbk_message_new(length) : NULL;
        if (!note)
            goto stray;
        memcpy(note->bytes, message, length);
        pbk_notes_push(d, note);
        return;
    }

    struct pbk_request *request = pbk_pending_take(&d->pending, header.unique);
    if (!request)
        goto stray;
    struct pbk_job *job = request->job;
    bool is_ok = header.error == 0;

    if (!is_whole) {
        pbk_dispatcher_log(d, "dispatcher: python's answer to request %u has %zu bytes and says %u", request->opcode,
                           length, header.len);
        pbk_reply(d, header.unique, -EIO, NULL, 0);
    } else if (request->opcode == FUSE_INIT && d->is_taken_over) {
        if (is_ok) {
            pbk_dispatcher_open(d);
        } else {
            pbk_dispatcher_log(d, "dispatcher: python refused what the kernel said: %s", strerror(-header.error));
            pbk_dispatcher_gone(d);
        }
    } else if (request->opcode == FUSE_INIT && is_ok && job) {
        struct fuse_init_in in;
        struct fuse_init_out out;
        memset(&in, 0, sizeof in);
        memcpy(&in, job->body, job->length < sizeof in ? job->length : sizeof in);
        pbk_fuse_init_reply(&in, job->length, &out);
        pbk_reply(d, header.unique, 0, &out, sizeof out);
    } else if (request->opcode == FUSE_INIT) {
        pass_on(d, &header, message, length);
    } else if (job) {
        job->error = pbk_fuse_error(header.error);
        pbk_pool_push_retry(d, job);
        job = NULL;
    } else if (request->opcode == FUSE_OPEN && is_ok) {
        answer_open(d, header.unique, request->nodeid, NULL);
    } else if (request->opcode == FUSE_CREATE && is_ok) {
        struct fuse_entry_out entry;
        if (body_length == sizeof entry + sizeof(struct fuse_open_out)) {
            memcpy(&entry, body, sizeof entry);
            answer_open(d, header.unique, entry.nodeid, &entry);
        } else {
            pbk_dispatcher_log(d, "dispatcher: python answered CREATE with %zu bytes", body_length);
            pbk_reply(d, header.unique, -EIO, NULL, 0);
        }
    } else {
        pass_on(d, &header, message, length);
    }
    free(job);
    free(request);
    return;

stray:
    pbk_count(&d->counters.stray_replies, 1);
}

void *pbk_pump_main(void *arg)
{
    struct pbk_dispatcher *d = arg;
    /* pyfuse3 answers with no more than what was asked for: a directory's page (see reader) or a name. */
    unsigned char *buffer = malloc(PBK_FUSE_BUFFER);
    if (!buffer) {
        pbk_dispatcher_log(d, "dispatcher: no memory for the pump");
        pbk_dispatcher_gone(d);
        return NULL;
    }
    for (;;) {
        bool is_full = atomic_load_explicit(&d->outbox.n, memory_order_relaxed) > 0;
        struct pollfd fds[2] = {{.fd = d->socket_fd, .events = (short)(POLLIN | (is_full ? POLLOUT : 0))},
                                {.fd = d->wake_fd, .events = POLLIN}};
        if (poll(fds, 2, -1) < 0 && errno != EINTR)
            break;
        if (fds[1].revents & POLLIN) {
            uint64_t n;
            ssize_t got = read(d->wake_fd, &n, sizeof n);
            (void)got;
        }
        drain_outbox(d);
        /* As many answers as there are, so that a busy pump polls seldom. */
        for (;;) {
            ssize_t got = recv(d->socket_fd, buffer, PBK_FUSE_BUFFER, MSG_DONTWAIT);
            if (got < 0 && (errno == EAGAIN || errno == EINTR))
                break;
            if (got <= 0) /* shut down by stop */
                goto out;
            take_answer(d, buffer, (size_t)got);
        }
    }
out:
    free(buffer);
    return NULL;
}

int pbk_notes_push(struct pbk_dispatcher *d, struct pbk_message *note)
{
    struct pbk_notes *notes = &d->notes;
    pthread_mutex_lock(&notes->lock);
    bool is_closed = notes->is_closed;
    if (!is_closed) {
        *notes->tail = note;
        notes->tail = &note->next;
        pthread_cond_signal(&notes->wake);
    }
    pthread_mutex_unlock(&notes->lock);
    if (is_closed) {
        free(note);
        return -ENOTCONN;
    }
    return 0;
}

void *pbk_notifier_main(void *arg)
{
    struct pbk_dispatcher *d = arg;
    struct pbk_notes *notes = &d->notes;
    pthread_mutex_lock(&notes->lock);
    while (!notes->is_closed) {
        struct pbk_message *note = notes->head;
        if (!note) {
            pthread_cond_wait(&notes->wake, &notes->lock);
            continue;
        }
        notes->head = note->next;
        if (!notes->head)
            notes->tail = &notes->head;
        pthread_mutex_unlock(&notes->lock);
        pbk_count(&d->counters.notified, 1);
        /* ENOENT: the kernel does not know the inode or name, so there is nothing to drop. */
        if (write(d->fuse_fd, note->bytes, note->length) < 0 && errno != ENOENT && errno != ENODEV) {
            pbk_count(&d->counters.notify_errors, 1);
            pbk_dispatcher_log(d, "dispatcher: the kernel refused a notification: %s", strerror(errno));
        }
        free(note);
        pthread_mutex_lock(&notes->lock);
    }
    pthread_mutex_unlock(&notes->lock);
    return NULL;
}

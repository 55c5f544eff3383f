/*
 * The requests that are answered without Python: data, and the handles of files that are registered. Called by readers and,
 * for what had to wait, by pool threads; each with its own worker.
 */
#define _GNU_SOURCE
#include "dispatcher_internal.h"

#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>

/* False if the argument is shorter than the protocol says. Copied: a message need not be aligned for its structures. */
#define PARSE(into, body, length) ((length) >= sizeof(into) && memcpy(&(into), (body), sizeof(into)))

/* A copy-up finds its object gone again only if a seal came between, which is rare. */
#define MAX_PARKED 16u

/* The request as a job: that of a pool thread, which gives it away, or a new one. NULL: no memory. */
static struct pbk_job *take_job(struct pbk_worker *worker, const struct fuse_in_header *header,
                                const unsigned char *body, size_t length)
{
    struct pbk_job *job = worker->job;
    worker->job = NULL;
    return job ? job : pbk_job_new(header, body, length);
}

/* Sends Python a request of its own, with an argument of n_in bytes, and parks this one until there is an answer. */
static void park(struct pbk_worker *worker, const struct fuse_in_header *header, const unsigned char *body,
                 size_t length, uint32_t opcode, const void *in, size_t n_in)
{
    struct pbk_dispatcher *d = worker->dispatcher;
    if (worker->job && worker->job->n_parked >= MAX_PARKED) {
        pbk_dispatcher_log(d, "dispatcher: inode %llu is not ready after %s", (unsigned long long)header->nodeid,
                           pbk_fuse_opcode_name(opcode));
        pbk_reply(d, header->unique, -EIO, NULL, 0);
        return;
    }
    struct pbk_job *job = take_job(worker, header, body, length);
    if (!job) {
        pbk_reply(d, header->unique, -ENOMEM, NULL, 0);
        return;
    }
    job->n_parked++;
    struct fuse_in_header asked = job->header;
    unsigned char message[sizeof asked + sizeof(struct fuse_write_in)];
    asked.opcode = opcode;
    asked.len = (uint32_t)(sizeof asked + n_in);
    asked.total_extlen = 0;
    memcpy(message, &asked, sizeof asked);
    memcpy(message + sizeof asked, in, n_in);
    pbk_forward(d, message, asked.len, job);
}

/* A write of nothing. */
static void park_for_copy_up(struct pbk_worker *worker, const struct fuse_in_header *header, const unsigned char *body,
                             size_t length)
{
    struct fuse_write_in in = {.fh = header->nodeid};
    pbk_count(&worker->dispatcher->counters.parked, 1);
    park(worker, header, body, length, FUSE_WRITE, &in, sizeof in);
}

void pbk_park_for_open(struct pbk_worker *worker, const struct fuse_in_header *header, const unsigned char *body,
                       size_t length)
{
    struct fuse_open_in in = {0};
    park(worker, header, body, length, FUSE_OPEN, &in, sizeof in);
}

/* Whether a page that the kernel has written back waits for space; else its request is to be answered with the error. */
static bool hold(struct pbk_worker *worker, const struct fuse_in_header *header, const unsigned char *body,
                 size_t length, const struct fuse_write_in *in, int error)
{
    struct pbk_dispatcher *d = worker->dispatcher;
    if ((error != -ENOSPC && error != -EDQUOT) || !(in->write_flags & FUSE_WRITE_CACHE) || d->hold_s == 0)
        return false;
    bool is_own = worker->job != NULL;
    struct pbk_job *job = take_job(worker, header, body, length);
    if (!job)
        return false;
    if (pbk_pool_hold(d, job))
        return true;
    if (is_own)
        worker->job = job;
    else
        free(job);
    return false;
}

static void read_file(struct pbk_worker *worker, const struct fuse_in_header *header, const unsigned char *body,
                      size_t length)
{
    struct pbk_dispatcher *d = worker->dispatcher;
    struct fuse_read_in in;
    struct pbk_node *node = NULL;
    ssize_t got = 0;
    int n_iov = 1;

    /* A longer read would be cut, which the kernel would take for the end of the file. */
    if (!PARSE(in, body, length) || in.size > PBK_FUSE_MAX_IO || in.offset > (uint64_t)INT64_MAX - in.size)
        got = -EINVAL;
    else if ((node = pbk_nodes_get(d->nodes, header->nodeid)))
        got = pbk_node_read(node, worker->ctx, in.offset, in.size, worker->iov, (int)PBK_N_IOV, &n_iov);
    if (!node && got == 0) {
        pbk_park_for_open(worker, header, body, length);
    } else if (got < 0) {
        pbk_reply(d, header->unique, (int)got, NULL, 0);
    } else {
        pbk_count(&d->counters.read_bytes, (uint64_t)got);
        pbk_reply_iov(d, header->unique, 0, worker->iov, n_iov);
    }
    if (node)
        pbk_node_put(node);
}

static void write_file(struct pbk_worker *worker, const struct fuse_in_header *header, const unsigned char *body,
                       size_t length)
{
    struct pbk_dispatcher *d = worker->dispatcher;
    struct fuse_write_in in;
    if (!PARSE(in, body, length) || in.size != length - sizeof in || in.size > PBK_FUSE_MAX_IO ||
        in.offset > (uint64_t)INT64_MAX - in.size) {
        pbk_reply(d, header->unique, -EINVAL, NULL, 0);
        return;
    }
    struct pbk_node *node = pbk_nodes_get(d->nodes, header->nodeid);
    if (!node) {
        pbk_park_for_open(worker, header, body, length);
        return;
    }
    /* Written-back pages that are answered short would be lost without an error, so go on until all is written. */
    size_t done = 0;
    ssize_t got = 0;
    while (done < in.size) {
        got = pbk_node_write(node, worker->ctx, in.offset + done, body + sizeof in + done, in.size - done);
        if (got <= 0)
            break;
        done += (size_t)got;
    }
    pbk_node_put(node);
    pbk_count(&d->counters.write_bytes, done);
    if (got == PBK_NO_OBJECT) {
        park_for_copy_up(worker, header, body, length);
    } else if (done < in.size) {
        uint64_t unique = header->unique;
        int error = got == 0 ? -EIO : (int)got;
        if (!hold(worker, header, body, length, &in, error))
            pbk_reply(d, unique, error, NULL, 0);
    } else {
        struct fuse_write_out out = {.size = in.size};
        pbk_reply(d, header->unique, 0, &out, sizeof out);
    }
}

static void fallocate_file(struct pbk_worker *worker, const struct fuse_in_header *header, const unsigned char *body,
                           size_t length)
{
    struct pbk_dispatcher *d = worker->dispatcher;
    struct fuse_fallocate_in in;
    if (!PARSE(in, body, length) || in.mode > INT32_MAX || in.offset > INT64_MAX ||
        in.length > (uint64_t)INT64_MAX - in.offset) {
        pbk_reply(d, header->unique, -EINVAL, NULL, 0);
        return;
    }
    struct pbk_node *node = pbk_nodes_get(d->nodes, header->nodeid);
    if (!node) {
        pbk_park_for_open(worker, header, body, length);
        return;
    }
    int error = pbk_node_fallocate(node, worker->ctx, (int)in.mode, in.offset, in.length);
    pbk_node_put(node);
    if (error == PBK_NO_OBJECT) {
        park_for_copy_up(worker, header, body, length);
        return;
    }
    /* ENOSYS would switch fallocate off for the whole mount, and glibc would write a byte into each block instead. */
    pbk_reply(d, header->unique, error == -ENOSYS ? -EOPNOTSUPP : error, NULL, 0);
}

static void reply_attributes(struct pbk_dispatcher *d, uint64_t unique, uint64_t ino, const struct stat *st,
                             uint64_t valid_s)
{
    struct fuse_attr_out out;
    memset(&out, 0, sizeof out);
    out.attr_valid = valid_s;
    out.attr.ino = ino;
    out.attr.size = (uint64_t)st->st_size;
    out.attr.blocks = (uint64_t)st->st_blocks;
    out.attr.atime = (uint64_t)st->st_atim.tv_sec;
    out.attr.mtime = (uint64_t)st->st_mtim.tv_sec;
    out.attr.ctime = (uint64_t)st->st_ctim.tv_sec;
    out.attr.atimensec = (uint32_t)st->st_atim.tv_nsec;
    out.attr.mtimensec = (uint32_t)st->st_mtim.tv_nsec;
    out.attr.ctimensec = (uint32_t)st->st_ctim.tv_nsec;
    out.attr.mode = st->st_mode;
    out.attr.nlink = (uint32_t)st->st_nlink;
    out.attr.uid = st->st_uid;
    out.attr.gid = st->st_gid;
    /* The kernel's own page size: a larger one would make it write back in larger pieces than it holds. */
    out.attr.blksize = 4096;
    pbk_reply(d, unique, 0, &out, sizeof out);
}

/*
 * Two changes of attributes are answered here, for files with an object.
 *
 * The time of the last write: with the write-back cache the kernel keeps it itself and sends it once in a while for every
 * written file, last before each FSYNC. It ignores the answer then (fuse_flush_times()), so that one is valid for no time.
 *
 * The size: PostgreSQL truncates every file that it is going to remove.
 */
static bool set_attributes(struct pbk_worker *worker, const struct fuse_in_header *header, const unsigned char *body,
                           size_t length)
{
    struct pbk_dispatcher *d = worker->dispatcher;
    struct fuse_setattr_in in;
    if (!PARSE(in, body, length) || !(in.valid & (FATTR_MTIME | FATTR_SIZE)) ||
        in.valid & ~(uint32_t)(FATTR_SIZE | FATTR_MTIME | FATTR_MTIME_NOW | FATTR_CTIME | FATTR_FH | FATTR_LOCKOWNER))
        return false;
    struct pbk_node *node = pbk_nodes_get(d->nodes, header->nodeid);
    if (!node)
        return false;
    struct stat st;
    int error = 0;
    if (in.valid & FATTR_SIZE)
        error = pbk_node_truncate(node, worker->ctx, in.size);
    if (!error && in.valid & FATTR_MTIME) {
        /* The kernel sends the time also where it says "now"; its value is the one it keeps. */
        struct timespec times[2] = {
            {.tv_nsec = UTIME_OMIT},
            {.tv_sec = (time_t)in.mtime, .tv_nsec = (long)in.mtimensec},
        };
        error = pbk_node_utimens(node, times);
    }
    if (!error)
        error = pbk_node_describe(node, &st);
    pbk_node_put(node);
    if (error == PBK_NO_OBJECT)
        return false;
    if (error)
        pbk_reply(d, header->unique, error, NULL, 0);
    else
        reply_attributes(d, header->unique, header->nodeid, &st, in.valid & FATTR_SIZE ? PBK_FUSE_VALID_S : 0);
    return true;
}

struct attributes_request {
    struct pbk_dispatcher *dispatcher;
    uint64_t unique, ino;
};

static void answer_attributes(void *arg, const struct stat *st)
{
    struct attributes_request *request = arg;
    reply_attributes(request->dispatcher, request->unique, request->ino, st, PBK_FUSE_VALID_S);
}

static bool get_attributes(struct pbk_dispatcher *d, const struct fuse_in_header *header)
{
    struct attributes_request request = {.dispatcher = d, .unique = header->unique, .ino = header->nodeid};
    return pbk_nodes_answer_directory(d->nodes, header->nodeid, answer_attributes, &request);
}

/* A name that is missing for sure. The kernel keeps the answer until it makes the name itself. */
static bool look_up(struct pbk_dispatcher *d, const struct fuse_in_header *header, const unsigned char *body,
                    size_t length)
{
    /* A name that is too long gets another answer, from Python. */
    if (length < 2 || length - 1 > NAME_MAX || body[length - 1] != 0 ||
        !pbk_nodes_is_absent(d->nodes, header->nodeid, body, length - 1))
        return false;
    struct fuse_entry_out out;
    memset(&out, 0, sizeof out);
    out.entry_valid = PBK_FUSE_VALID_S;
    pbk_reply(d, header->unique, 0, &out, sizeof out);
    return true;
}

/* A node that Python has registered once is opened without it from then on. */
static bool open_file(struct pbk_dispatcher *d, const struct fuse_in_header *header)
{
    struct pbk_node *node = pbk_nodes_get(d->nodes, header->nodeid);
    if (!node)
        return false;
    struct fuse_open_out out = {.fh = header->nodeid, .open_flags = FOPEN_KEEP_CACHE};
    pbk_node_opened(node); /* before the kernel knows: its RELEASE may come while we are still here */
    if (!pbk_reply(d, header->unique, 0, &out, sizeof out))
        pbk_node_released(node);
    pbk_node_put(node);
    return true;
}

static void release_file(struct pbk_dispatcher *d, const struct fuse_in_header *header)
{
    struct pbk_node *node = pbk_nodes_get(d->nodes, header->nodeid);
    if (node) {
        pbk_node_released(node);
        pbk_node_put(node);
    }
    pbk_reply(d, header->unique, 0, NULL, 0);
}

static void queue_fsync(struct pbk_worker *worker, const struct fuse_in_header *header, const unsigned char *body,
                        size_t length)
{
    struct pbk_dispatcher *d = worker->dispatcher;
    struct pbk_job *job = take_job(worker, header, body, length);
    if (job)
        pbk_pool_push_fsync(d, job);
    else
        pbk_reply(d, header->unique, -ENOMEM, NULL, 0);
}

bool pbk_answer_hot(struct pbk_worker *worker, const struct fuse_in_header *header, const unsigned char *body,
                    size_t length)
{
    struct pbk_dispatcher *d = worker->dispatcher;
    switch (header->opcode) {
    case FUSE_READ:
        read_file(worker, header, body, length);
        return true;
    case FUSE_WRITE:
        write_file(worker, header, body, length);
        return true;
    case FUSE_FSYNC:
        queue_fsync(worker, header, body, length);
        return true;
    case FUSE_FALLOCATE:
        fallocate_file(worker, header, body, length);
        return true;
    case FUSE_SETATTR:
        return set_attributes(worker, header, body, length);
    case FUSE_OPEN:
        return open_file(d, header);
    case FUSE_RELEASE:
        release_file(d, header);
        return true;
    case FUSE_OPENDIR: {
        /* readdir gets the inode as its handle, and the kernel may keep what it read for the next opendir. */
        struct fuse_open_out out = {.fh = header->nodeid, .open_flags = FOPEN_KEEP_CACHE | FOPEN_CACHE_DIR};
        pbk_reply(d, header->unique, 0, &out, sizeof out);
        return true;
    }
    case FUSE_RELEASEDIR:
    case FUSE_DESTROY:
        pbk_reply(d, header->unique, 0, NULL, 0);
        return true;
    case FUSE_LOOKUP:
        return look_up(d, header, body, length);
    case FUSE_GETATTR:
        return get_attributes(d, header);
    case FUSE_INIT:
    case FUSE_FORGET:
    case FUSE_BATCH_FORGET:
    case FUSE_READLINK:
    case FUSE_SYMLINK:
    case FUSE_MKNOD:
    case FUSE_MKDIR:
    case FUSE_UNLINK:
    case FUSE_RMDIR:
    case FUSE_RENAME:
    case FUSE_RENAME2:
    case FUSE_LINK:
    case FUSE_STATFS:
    case FUSE_CREATE:
    case FUSE_READDIR:
    case FUSE_READDIRPLUS:
    case FUSE_FSYNCDIR:
        return false;
    default:
        /*
         * The kernel stops asking, and does without or by other means: FLUSH and ACCESS are not needed, LSEEK takes the
         * whole file for data, COPY_FILE_RANGE copies through the page cache, xattrs, IOCTL and TMPFILE become
         * EOPNOTSUPP or ENOTTY, INTERRUPT means that callers wait.
         */
        pbk_reply(d, header->unique, -ENOSYS, NULL, 0);
        return true;
    }
}

/*
 * The dispatcher against a kernel and a Python made of threads, over socketpairs, on nodes that keep their bytes in memory.
 * Meant for ThreadSanitizer and AddressSanitizer: many callers at once, a Python that is slow and full, copy-ups, and ends
 * of every kind.
 */
#define _GNU_SOURCE
#include "check.h"
#include "pbk/dispatcher.h"
#include "pbk/fuse_proto.h"

#include <dirent.h>
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#if defined(__SANITIZE_ADDRESS__)
/* The stack of a cancelled thread stays poisoned, and the sanitizer would then stumble in its own clean-up of it. */
const char *__asan_default_options(void);
const char *__asan_default_options(void)
{
    return "use_sigaltstack=0";
}
#endif

/* --- nodes that keep their bytes in memory ------------------------------------------------------------------------- */

#define N_NODES 8u
#define NODE_BYTES 65536u
#define FIRST_INO 10u

struct pbk_node {
    uint64_t ino;
    pthread_mutex_t lock;
    _Atomic bool has_object;
    _Atomic int n_refs, n_handles, n_fsyncs;
    unsigned char bytes[NODE_BYTES];
};

struct pbk_nodes {
    struct pbk_node node[N_NODES];
};

struct pbk_ctx {
    unsigned char bytes[NODE_BYTES];
};

static _Atomic int n_contexts;

struct pbk_ctx *pbk_ctx_new(size_t max_io)
{
    CHECK(max_io >= NODE_BYTES);
    atomic_fetch_add(&n_contexts, 1);
    return malloc(sizeof(struct pbk_ctx));
}

void pbk_ctx_free(struct pbk_ctx *ctx)
{
    atomic_fetch_sub(&n_contexts, 1);
    free(ctx);
}

struct pbk_node *pbk_nodes_get(struct pbk_nodes *nodes, uint64_t ino)
{
    if (ino < FIRST_INO || ino >= FIRST_INO + N_NODES)
        return NULL;
    struct pbk_node *node = &nodes->node[ino - FIRST_INO];
    atomic_fetch_add(&node->n_refs, 1);
    return node;
}

bool pbk_nodes_is_absent(struct pbk_nodes *nodes, uint64_t directory, const void *name, size_t length)
{
    (void)nodes;
    return directory == 1 && length == 7 && memcmp(name, "missing", 7) == 0;
}

bool pbk_nodes_answer_directory(struct pbk_nodes *nodes, uint64_t ino, void (*answer)(void *arg, const struct stat *),
                                void *arg)
{
    (void)nodes;
    struct stat st = {.st_mode = S_IFDIR | 0700, .st_nlink = 7};
    if (ino != 1)
        return false;
    answer(arg, &st);
    return true;
}

void pbk_node_put(struct pbk_node *node)
{
    CHECK(atomic_fetch_sub(&node->n_refs, 1) > 0);
}

ssize_t pbk_node_read(struct pbk_node *node, struct pbk_ctx *ctx, uint64_t off, size_t len, struct iovec *iov,
                      int max_iov, int *n_iov)
{
    if (off >= NODE_BYTES) {
        *n_iov = 1;
        return 0;
    }
    if (len > NODE_BYTES - off)
        len = NODE_BYTES - off;
    pthread_mutex_lock(&node->lock);
    memcpy(ctx->bytes, node->bytes + off, len);
    pthread_mutex_unlock(&node->lock);
    /* In pieces, as pages come from a chain. */
    int n = 1;
    for (size_t at = 0; at < len; at += PBK_BLCKSZ) {
        CHECK(n < max_iov);
        size_t piece = len - at < PBK_BLCKSZ ? len - at : PBK_BLCKSZ;
        iov[n++] = (struct iovec){.iov_base = ctx->bytes + at, .iov_len = piece};
    }
    *n_iov = n;
    return (ssize_t)len;
}

ssize_t pbk_node_write(struct pbk_node *node, struct pbk_ctx *ctx, uint64_t off, const void *data, size_t len)
{
    (void)ctx;
    if (!atomic_load(&node->has_object))
        return PBK_NO_OBJECT;
    if (off >= NODE_BYTES || len > NODE_BYTES - off)
        return -EFBIG;
    if (len > 5000)
        len = 5000; /* a short write has to be gone on with */
    pthread_mutex_lock(&node->lock);
    memcpy(node->bytes + off, data, len);
    pthread_mutex_unlock(&node->lock);
    return (ssize_t)len;
}

int pbk_node_fallocate(struct pbk_node *node, struct pbk_ctx *ctx, int mode, uint64_t off, uint64_t len)
{
    (void)ctx, (void)off, (void)len;
    if (!atomic_load(&node->has_object))
        return PBK_NO_OBJECT;
    return mode ? -ENOSYS : 0;
}

int pbk_node_truncate(struct pbk_node *node, struct pbk_ctx *ctx, uint64_t size)
{
    (void)ctx;
    if (!atomic_load(&node->has_object))
        return PBK_NO_OBJECT;
    return size > NODE_BYTES ? -EFBIG : 0;
}

int pbk_node_describe(struct pbk_node *node, struct stat *st)
{
    if (!atomic_load(&node->has_object))
        return PBK_NO_OBJECT;
    memset(st, 0, sizeof *st);
    st->st_size = NODE_BYTES;
    st->st_nlink = 1;
    return 0;
}

int pbk_node_utimens(struct pbk_node *node, const struct timespec ts[2])
{
    (void)ts;
    return atomic_load(&node->has_object) ? 0 : PBK_NO_OBJECT;
}

int pbk_node_fsync(struct pbk_node *node, bool datasync)
{
    (void)datasync;
    atomic_fetch_add(&node->n_fsyncs, 1);
    return 0;
}

void pbk_node_opened(struct pbk_node *node)
{
    atomic_fetch_add(&node->n_handles, 1);
}

void pbk_node_released(struct pbk_node *node)
{
    CHECK(atomic_fetch_sub(&node->n_handles, 1) > 0);
}

/* --- a stage: kernel, dispatcher, Python ---------------------------------------------------------------------------- */

#define MESSAGE_BYTES (NODE_BYTES + 4096u)
#define N_SLOTS 64u

/* What a caller waits for. Locked by the stage's lock. */
struct slot {
    uint64_t unique; /* 0: free */
    bool is_answered;
    int32_t error;
    size_t length;
    unsigned char body[MESSAGE_BYTES];
};

struct stage {
    struct pbk_nodes nodes;
    struct pbk_dispatcher *dispatcher;
    int kernel_fd, fuse_fd;
    int python_fd;
    pthread_t kernel, python;

    pthread_mutex_t lock;
    pthread_cond_t answered;
    struct slot slots[N_SLOTS];
    _Atomic uint64_t next_unique;
    _Atomic int n_notes, n_forgets, n_copy_ups;
    _Atomic int python_mood; /* 0: answers; 1: reads nothing; 2: reads and does not answer */
    _Atomic bool is_over;
};

static void *kernel_main(void *arg)
{
    struct stage *stage = arg;
    unsigned char *message = malloc(PBK_FUSE_BUFFER);
    for (;;) {
        ssize_t got = recv(stage->kernel_fd, message, PBK_FUSE_BUFFER, 0);
        if (got <= 0)
            break;
        struct fuse_out_header header;
        CHECK((size_t)got >= sizeof header);
        memcpy(&header, message, sizeof header);
        CHECK(header.len == (size_t)got);
        if (header.unique == 0) {
            atomic_fetch_add(&stage->n_notes, 1);
            continue;
        }
        CHECK(header.error <= 0 && header.error > -512);
        CHECK(!header.error || (size_t)got == sizeof header);
        pthread_mutex_lock(&stage->lock);
        struct slot *found = NULL;
        for (unsigned i = 0; i < N_SLOTS; i++)
            if (stage->slots[i].unique == header.unique)
                found = &stage->slots[i];
        CHECK(found && !found->is_answered); /* no answer twice, none to what nobody asked */
        found->error = header.error;
        found->length = (size_t)got - sizeof header;
        CHECK(found->length <= sizeof found->body);
        memcpy(found->body, message + sizeof header, found->length);
        found->is_answered = true;
        pthread_cond_broadcast(&stage->answered);
        pthread_mutex_unlock(&stage->lock);
    }
    free(message);
    return NULL;
}

static void answer(struct stage *stage, uint64_t unique, int error, const void *body, size_t length)
{
    unsigned char message[sizeof(struct fuse_out_header) + 512];
    struct fuse_out_header header = {.len = (uint32_t)(sizeof header + length), .error = error, .unique = unique};
    CHECK(length <= 512);
    memcpy(message, &header, sizeof header);
    if (length)
        memcpy(message + sizeof header, body, length);
    send(stage->python_fd, message, header.len, MSG_NOSIGNAL);
}

static void *python_main(void *arg)
{
    struct stage *stage = arg;
    unsigned char *message = malloc(PBK_FUSE_BUFFER);
    while (!atomic_load(&stage->is_over)) {
        struct pollfd fd = {.fd = stage->python_fd, .events = POLLIN};
        if (atomic_load(&stage->python_mood) == 1) {
            poll(NULL, 0, 1);
            continue;
        }
        if (poll(&fd, 1, 20) <= 0)
            continue;
        ssize_t got = recv(stage->python_fd, message, PBK_FUSE_BUFFER, MSG_DONTWAIT);
        if (got == 0)
            break;
        if (got < 0)
            continue;
        struct fuse_in_header header;
        CHECK((size_t)got >= sizeof header);
        memcpy(&header, message, sizeof header);
        CHECK(header.len == (size_t)got);
        const unsigned char *body = message + sizeof header;
        if (header.opcode == FUSE_FORGET) {
            atomic_fetch_add(&stage->n_forgets, 1);
            continue;
        }
        if (header.opcode == FUSE_BATCH_FORGET) {
            struct fuse_batch_forget_in batch;
            memcpy(&batch, body, sizeof batch);
            CHECK((size_t)got == sizeof header + sizeof batch + batch.count * sizeof(struct fuse_forget_one));
            atomic_fetch_add(&stage->n_forgets, (int)batch.count);
            continue;
        }
        if (atomic_load(&stage->python_mood) == 2)
            continue;
        switch (header.opcode) {
        case FUSE_INIT: {
            struct fuse_init_in in;
            CHECK((size_t)got == sizeof header + sizeof in);
            memcpy(&in, body, sizeof in);
            CHECK(in.minor == 13);
            unsigned char out[FUSE_COMPAT_22_INIT_OUT_SIZE] = {7, 0, 0, 0, 13};
            answer(stage, header.unique, 0, out, sizeof out);
            break;
        }
        case FUSE_WRITE: { /* copy up */
            struct fuse_write_in in;
            CHECK((size_t)got == sizeof header + sizeof in);
            memcpy(&in, body, sizeof in);
            CHECK(in.size == 0 && in.fh == header.nodeid);
            atomic_fetch_add(&stage->n_copy_ups, 1);
            if (header.nodeid == FIRST_INO + N_NODES - 1) {
                answer(stage, header.unique, -ENOSPC, NULL, 0); /* the last one never gets an object */
            } else {
                atomic_store(&stage->nodes.node[header.nodeid - FIRST_INO].has_object, true);
                struct fuse_write_out out = {.size = 0};
                answer(stage, header.unique, 0, &out, sizeof out);
            }
            break;
        }
        case FUSE_CREATE: {
            struct {
                struct fuse_entry_out entry;
                struct fuse_open_out open;
            } out;
            memset(&out, 0, sizeof out);
            out.entry.nodeid = FIRST_INO;
            out.open.fh = 77;
            answer(stage, header.unique, 0, &out, sizeof out);
            break;
        }
        case FUSE_LOOKUP: {
            struct fuse_entry_out out;
            memset(&out, 0, sizeof out);
            out.nodeid = header.nodeid + 1;
            answer(stage, header.unique + 2, 0, &out, sizeof out); /* an answer to something nobody asked */
            answer(stage, header.unique, 0, &out, sizeof out);
            break;
        }
        case FUSE_READLINK: { /* longer than it says */
            struct fuse_out_header out = {.len = 5000, .unique = header.unique};
            send(stage->python_fd, &out, sizeof out, MSG_NOSIGNAL);
            break;
        }
        case FUSE_READDIRPLUS: {
            struct fuse_read_in in;
            memcpy(&in, body, sizeof in);
            CHECK(in.size <= 65536 && in.fh == header.nodeid);
            answer(stage, header.unique, 0, "entries", 7);
            break;
        }
        default:
            answer(stage, header.unique, 1234, NULL, 0); /* an errno that no kernel takes */
        }
    }
    free(message);
    return NULL;
}

static void raise_socket(int fd)
{
    int bytes = 4 << 20;
    if (setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &bytes, sizeof bytes) < 0)
        setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &bytes, sizeof bytes);
}

static struct stage *stage_new(unsigned n_readers)
{
    struct stage *stage = calloc(1, sizeof *stage);
    CHECK(stage);
    pthread_mutex_init(&stage->lock, NULL);
    pthread_cond_init(&stage->answered, NULL);
    atomic_store(&stage->next_unique, 1000);
    for (unsigned i = 0; i < N_NODES; i++) {
        stage->nodes.node[i].ino = FIRST_INO + i;
        pthread_mutex_init(&stage->nodes.node[i].lock, NULL);
    }
    int pair[2];
    CHECK(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) == 0);
    stage->kernel_fd = pair[0];
    stage->fuse_fd = pair[1];
    raise_socket(pair[0]);
    raise_socket(pair[1]);
    struct pbk_dispatcher_options options = {.n_readers = n_readers, .n_fsync = 2, .log_fd = -1};
    CHECK(pbk_dispatcher_new(&stage->nodes, stage->fuse_fd, &options, &stage->dispatcher) == 0);
    stage->python_fd = dup(pbk_dispatcher_socket_fd(stage->dispatcher));
    CHECK(pbk_dispatcher_invalidate(stage->dispatcher, 1, 0, 0) == -ENOTCONN);
    CHECK(pbk_dispatcher_start(stage->dispatcher) == 0);
    CHECK(pbk_dispatcher_start(stage->dispatcher) == -EALREADY);
    pthread_create(&stage->kernel, NULL, kernel_main, stage);
    pthread_create(&stage->python, NULL, python_main, stage);
    return stage;
}

static void stage_free(struct stage *stage)
{
    pbk_dispatcher_stop(stage->dispatcher);
    pbk_dispatcher_stop(stage->dispatcher);
    atomic_store(&stage->is_over, true);
    shutdown(stage->kernel_fd, SHUT_RDWR);
    pthread_join(stage->kernel, NULL);
    pthread_join(stage->python, NULL);
    pbk_dispatcher_free(stage->dispatcher);
    close(stage->python_fd);
    close(stage->kernel_fd);
    close(stage->fuse_fd);
    CHECK(atomic_load(&n_contexts) == 0);
    for (unsigned i = 0; i < N_NODES; i++) {
        CHECK(atomic_load(&stage->nodes.node[i].n_refs) == 0);
        pthread_mutex_destroy(&stage->nodes.node[i].lock);
    }
    pthread_mutex_destroy(&stage->lock);
    pthread_cond_destroy(&stage->answered);
    free(stage);
}

/* Sends a request without waiting; its slot. */
static struct slot *ask(struct stage *stage, uint32_t opcode, uint64_t nodeid, const void *arg, size_t arg_length,
                        const void *data, size_t data_length)
{
    size_t length = sizeof(struct fuse_in_header) + arg_length + data_length;
    unsigned char *message = malloc(length);
    struct fuse_in_header header = {.len = (uint32_t)length, .opcode = opcode, .nodeid = nodeid};
    header.unique = atomic_fetch_add(&stage->next_unique, 2) * 2;
    struct slot *slot = NULL;
    if (opcode != FUSE_FORGET && opcode != FUSE_BATCH_FORGET) {
        pthread_mutex_lock(&stage->lock);
        for (unsigned i = 0; i < N_SLOTS && !slot; i++)
            if (!stage->slots[i].unique)
                slot = &stage->slots[i];
        CHECK(slot);
        slot->unique = header.unique;
        slot->is_answered = false;
        pthread_mutex_unlock(&stage->lock);
    }
    memcpy(message, &header, sizeof header);
    if (arg_length)
        memcpy(message + sizeof header, arg, arg_length);
    if (data_length)
        memcpy(message + sizeof header + arg_length, data, data_length);
    CHECK(send(stage->kernel_fd, message, length, MSG_NOSIGNAL) == (ssize_t)length);
    free(message);
    return slot;
}

/* Waits for the answer: its error; the body, if wanted, to into. */
static int await_answer(struct stage *stage, struct slot *slot, void *into, size_t length)
{
    pthread_mutex_lock(&stage->lock);
    while (!slot->is_answered)
        pthread_cond_wait(&stage->answered, &stage->lock);
    int error = slot->error;
    if (!error && into) {
        CHECK(slot->length == length);
        memcpy(into, slot->body, length);
    }
    slot->unique = 0;
    pthread_mutex_unlock(&stage->lock);
    return error;
}

static int call(struct stage *stage, uint32_t opcode, uint64_t nodeid, const void *arg, size_t arg_length, void *into,
                size_t length)
{
    return await_answer(stage, ask(stage, opcode, nodeid, arg, arg_length, NULL, 0), into, length);
}

static int write_file(struct stage *stage, uint64_t ino, uint64_t offset, const void *data, uint32_t size)
{
    struct fuse_write_in in = {.fh = ino, .offset = offset, .size = size};
    struct fuse_write_out out = {.size = 0};
    int error = await_answer(stage, ask(stage, FUSE_WRITE, ino, &in, sizeof in, data, size), &out, sizeof out);
    CHECK(error || out.size == size);
    return error;
}

static int read_file(struct stage *stage, uint64_t ino, uint64_t offset, void *into, uint32_t size)
{
    struct fuse_read_in in = {.fh = ino, .offset = offset, .size = size};
    return call(stage, FUSE_READ, ino, &in, sizeof in, into, size);
}

/* --- the cases -------------------------------------------------------------------------------------------------------- */

static void test_init(void)
{
    struct stage *stage = stage_new(4);
    struct fuse_init_in in = {.major = 7,
                              .minor = 45,
                              .max_readahead = 131072,
                              .flags = FUSE_INIT_EXT | FUSE_WRITEBACK_CACHE | FUSE_MAX_PAGES | FUSE_AUTO_INVAL_DATA |
                                       FUSE_ATOMIC_O_TRUNC | FUSE_DO_READDIRPLUS | FUSE_HANDLE_KILLPRIV,
                              .flags2 = 0xFFFFFFFFu};
    struct fuse_init_out out;
    CHECK(call(stage, FUSE_INIT, 0, &in, sizeof in, &out, sizeof out) == 0);
    CHECK(out.major == 7 && out.minor == 38 && out.time_gran == 1 && out.max_background == 128);
    CHECK(out.flags == (FUSE_INIT_EXT | FUSE_WRITEBACK_CACHE | FUSE_MAX_PAGES | FUSE_DO_READDIRPLUS));
    CHECK(out.flags2 == (uint32_t)(FUSE_HAS_RESEND >> 32));
    CHECK(out.max_write == 1u << 20 && out.max_pages == 256);
    stage_free(stage);

    /* A kernel that knows neither: no second word of flags is taken from it, and requests stay small. */
    struct fuse_init_in old = {.major = 7, .minor = 27, .flags = FUSE_WRITEBACK_CACHE, .flags2 = 0xFFFFFFFFu};
    pbk_fuse_init_reply(&old, 16, &out);
    CHECK(out.flags == FUSE_WRITEBACK_CACHE && out.flags2 == 0 && out.max_pages == 0 && out.max_write == 131072);
}

struct caller {
    struct stage *stage;
    unsigned number;
    unsigned n_rounds;
};

static void *caller_main(void *arg)
{
    struct caller *caller = arg;
    struct stage *stage = caller->stage;
    /* Two callers a file, a half each. */
    uint64_t ino = FIRST_INO + caller->number / 2;
    uint64_t start = caller->number % 2 * (NODE_BYTES / 2);
    unsigned char wrote[NODE_BYTES / 2], got[NODE_BYTES / 2];
    unsigned seed = caller->number;
    for (unsigned round = 0; round < caller->n_rounds; round++) {
        struct fuse_open_in open_in = {.flags = 2};
        struct fuse_open_out open_out;
        CHECK(call(stage, FUSE_OPEN, ino, &open_in, sizeof open_in, &open_out, sizeof open_out) == 0);
        CHECK(open_out.fh == ino && open_out.open_flags == FOPEN_KEEP_CACHE);

        uint32_t size = 1 + (uint32_t)rand_r(&seed) % (uint32_t)sizeof wrote;
        memset(wrote, (int)(round + caller->number), size);
        CHECK(write_file(stage, ino, start, wrote, size) == 0);
        CHECK(read_file(stage, ino, start, got, size) == 0);
        CHECK(memcmp(wrote, got, size) == 0);

        struct fuse_setattr_in setattr = {.valid = FATTR_MTIME | FATTR_CTIME, .mtime = 5};
        struct fuse_attr_out attr;
        CHECK(call(stage, FUSE_SETATTR, ino, &setattr, sizeof setattr, &attr, sizeof attr) == 0);
        CHECK(attr.attr.ino == ino && attr.attr_valid == 0);
        setattr = (struct fuse_setattr_in){.valid = FATTR_SIZE | FATTR_MTIME | FATTR_CTIME, .size = NODE_BYTES};
        CHECK(call(stage, FUSE_SETATTR, ino, &setattr, sizeof setattr, &attr, sizeof attr) == 0);
        CHECK(attr.attr.ino == ino && attr.attr_valid == PBK_FUSE_VALID_S && attr.attr.nlink == 1);
        setattr.size = NODE_BYTES + 1;
        CHECK(call(stage, FUSE_SETATTR, ino, &setattr, sizeof setattr, &attr, sizeof attr) == -EFBIG);
        struct fuse_getattr_in getattr = {.fh = 0};
        CHECK(call(stage, FUSE_GETATTR, 1, &getattr, sizeof getattr, &attr, sizeof attr) == 0);
        CHECK(attr.attr.ino == 1 && attr.attr_valid == PBK_FUSE_VALID_S && attr.attr.nlink == 7);

        struct fuse_fsync_in fsync_in = {.fh = ino, .fsync_flags = round & 1};
        CHECK(call(stage, FUSE_FSYNC, ino, &fsync_in, sizeof fsync_in, NULL, 0) == 0);
        struct fuse_fallocate_in fallocate_in = {.fh = ino, .length = 10, .mode = round & 1};
        CHECK(call(stage, FUSE_FALLOCATE, ino, &fallocate_in, sizeof fallocate_in, NULL, 0) ==
              (round & 1 ? -EOPNOTSUPP : 0));
        struct fuse_entry_out entry;
        CHECK(call(stage, FUSE_LOOKUP, 1, "name", 5, &entry, sizeof entry) == 0);
        CHECK(entry.nodeid == 2);
        CHECK(call(stage, FUSE_LOOKUP, 1, "missing", 8, &entry, sizeof entry) == 0);
        CHECK(entry.nodeid == 0 && entry.entry_valid == PBK_FUSE_VALID_S && entry.attr_valid == 0);
        struct fuse_read_in readdir_in = {.size = 1u << 20};
        char entries[7];
        CHECK(call(stage, FUSE_READDIRPLUS, 1, &readdir_in, sizeof readdir_in, entries, sizeof entries) == 0);
        CHECK(call(stage, FUSE_RENAME, 1, "garbage", 7, NULL, 0) == -EIO);
        CHECK(call(stage, FUSE_GETXATTR, ino, "garbage", 7, NULL, 0) == -ENOSYS);
        ask(stage, FUSE_FORGET, ino, &(struct fuse_forget_in){.nlookup = 1}, sizeof(struct fuse_forget_in), NULL, 0);
        if (round % 4 == 0)
            CHECK(pbk_dispatcher_invalidate(stage->dispatcher, ino, 0, 0) == 0);
        if (round % 16 == 0)
            pbk_dispatcher_reset_counters(stage->dispatcher);

        struct fuse_release_in release = {.fh = ino};
        CHECK(call(stage, FUSE_RELEASE, ino, &release, sizeof release, NULL, 0) == 0);
    }
    return NULL;
}

static void count_nothing(void *arg, const char *name, uint64_t value)
{
    (void)name, (void)value;
    ++*(unsigned *)arg;
}

static void test_many_callers(unsigned n_rounds)
{
    struct stage *stage = stage_new(4);
    struct caller callers[12];
    pthread_t threads[12];
    for (unsigned i = 0; i < 12; i++) {
        callers[i] = (struct caller){stage, i, n_rounds};
        pthread_create(&threads[i], NULL, caller_main, &callers[i]);
    }
    unsigned n_counters = 0;
    for (unsigned i = 0; i < 12; i++) {
        pbk_dispatcher_counters(stage->dispatcher, count_nothing, &n_counters);
        pthread_join(threads[i], NULL);
    }
    CHECK(n_counters > 12);
    for (unsigned i = 0; i < 6; i++) {
        CHECK(atomic_load(&stage->nodes.node[i].n_handles) == 0);
        CHECK(atomic_load(&stage->nodes.node[i].n_fsyncs) == (int)(2 * n_rounds));
    }
    /* Forgets and notifications need no answer, so they may still be on their way. */
    while (atomic_load(&stage->n_forgets) < (int)(12 * n_rounds) ||
           atomic_load(&stage->n_notes) < (int)(12 * ((n_rounds + 3) / 4)))
        poll(NULL, 0, 1);
    stage_free(stage);
}

static void test_malformed(void)
{
    struct stage *stage = stage_new(4);
    uint64_t ino = FIRST_INO;
    struct fuse_write_in lying = {.fh = ino, .size = 1000000};
    CHECK(await_answer(stage, ask(stage, FUSE_WRITE, ino, &lying, sizeof lying, "x", 1), NULL, 0) == -EINVAL);
    CHECK(call(stage, FUSE_WRITE, ino, "short", 5, NULL, 0) == -EINVAL);
    CHECK(call(stage, FUSE_READ, ino, "short", 5, NULL, 0) == -EINVAL);
    struct fuse_read_in far = {.offset = UINT64_MAX - 5, .size = 10}, wide = {.size = 2u << 20};
    CHECK(call(stage, FUSE_READ, ino, &far, sizeof far, NULL, 0) == -EINVAL);
    CHECK(call(stage, FUSE_READ, ino, &wide, sizeof wide, NULL, 0) == -EINVAL);
    CHECK(call(stage, FUSE_READ, 5000, &(struct fuse_read_in){.size = 1}, sizeof far, NULL, 0) == -EIO);
    CHECK(call(stage, FUSE_FSYNC, ino, "x", 1, NULL, 0) == -EIO);
    CHECK(call(stage, FUSE_FALLOCATE, ino, "x", 1, NULL, 0) == -EINVAL);
    struct fuse_fallocate_in over = {.offset = INT64_MAX, .length = INT64_MAX};
    CHECK(call(stage, FUSE_FALLOCATE, ino, &over, sizeof over, NULL, 0) == -EINVAL);
    CHECK(call(stage, FUSE_READLINK, 5, NULL, 0, NULL, 0) == -EIO);
    CHECK(send(stage->python_fd, "x", 1, MSG_NOSIGNAL) == 1);
    CHECK(call(stage, 63, 1, NULL, 0, NULL, 0) == -ENOSYS);
    CHECK(call(stage, 100000, 1, NULL, 0, NULL, 0) == -ENOSYS);
    /* A batch that says to be longer than it is goes nowhere; a long one goes in pieces. */
    struct {
        struct fuse_batch_forget_in batch;
        struct fuse_forget_one forgets[3000];
    } *forgets = calloc(1, sizeof *forgets);
    forgets->batch.count = 3001;
    ask(stage, FUSE_BATCH_FORGET, 0, forgets, sizeof *forgets, NULL, 0);
    forgets->batch.count = 3000;
    ask(stage, FUSE_BATCH_FORGET, 0, forgets, sizeof *forgets, NULL, 0);
    free(forgets);
    while (atomic_load(&stage->n_forgets) < 3000)
        poll(NULL, 0, 1);
    CHECK(atomic_load(&stage->n_forgets) == 3000);
    /* What Python cannot do is the caller's error, and the others go on. */
    CHECK(write_file(stage, FIRST_INO + N_NODES - 1, 0, "data", 4) == -ENOSPC);
    CHECK(write_file(stage, ino, 0, "data", 4) == 0);
    /* CREATE counts a handle, as OPEN does. */
    struct {
        struct fuse_entry_out entry;
        struct fuse_open_out open;
    } created;
    CHECK(call(stage, FUSE_CREATE, 1, "garbage", 7, &created, sizeof created) == 0);
    CHECK(created.open.fh == FIRST_INO && atomic_load(&stage->nodes.node[0].n_handles) == 1);
    stage_free(stage);
}

/* A Python that does not read: requests pile up behind the socketpair, hot ones are answered all the same. */
static void test_python_is_busy(void)
{
    struct stage *stage = stage_new(4);
    atomic_store(&stage->python_mood, 1);
    struct slot *waiting[16];
    for (unsigned i = 0; i < 16; i++)
        waiting[i] = ask(stage, FUSE_LOOKUP, 1, "name", 5, NULL, 0);
    for (unsigned i = 0; i < 30000; i++)
        ask(stage, FUSE_FORGET, 1, &(struct fuse_forget_in){.nlookup = 1}, sizeof(struct fuse_forget_in), NULL, 0);
    struct slot *parked = NULL;
    struct fuse_write_in in = {.fh = FIRST_INO, .size = 4};
    parked = ask(stage, FUSE_WRITE, FIRST_INO, &in, sizeof in, "data", 4);
    unsigned char got[100];
    for (unsigned i = 0; i < 100; i++)
        CHECK(read_file(stage, FIRST_INO + 1, 0, got, sizeof got) == 0);
    atomic_store(&stage->python_mood, 0);
    for (unsigned i = 0; i < 16; i++)
        CHECK(await_answer(stage, waiting[i], NULL, 0) == 0);
    CHECK(await_answer(stage, parked, NULL, 0) == 0);
    while (atomic_load(&stage->n_forgets) < 30000)
        poll(NULL, 0, 1);
    stage_free(stage);
}

/* Stopped with Python owing answers, the kernel connected: everybody gets an error, no thread stays. */
static void test_stop_under_load(void)
{
    struct stage *stage = stage_new(4);
    atomic_store(&stage->python_mood, 2);
    struct slot *waiting[8];
    struct fuse_write_in in = {.fh = FIRST_INO, .size = 4};
    for (unsigned i = 0; i < 8; i++)
        waiting[i] = i % 2 ? ask(stage, FUSE_LOOKUP, 1, "name", 5, NULL, 0)
                           : ask(stage, FUSE_WRITE, FIRST_INO, &in, sizeof in, "data", 4);
    unsigned char got[10];
    CHECK(read_file(stage, FIRST_INO, 0, got, sizeof got) == 0);
    pbk_dispatcher_stop(stage->dispatcher);
    CHECK(pbk_dispatcher_invalidate(stage->dispatcher, 1, 0, 0) == -ENOTCONN);
    /* Those that were read are failed; a request still in the socket is the kernel's to fail. */
    pthread_mutex_lock(&stage->lock);
    for (unsigned i = 0; i < 8; i++)
        CHECK(!waiting[i]->is_answered || waiting[i]->error < 0);
    pthread_mutex_unlock(&stage->lock);
    stage_free(stage);
}

static void test_kernel_goes(void)
{
    struct stage *stage = stage_new(4);
    unsigned char got[10];
    CHECK(read_file(stage, FIRST_INO, 0, got, sizeof got) == 0);
    struct pollfd fd = {.fd = pbk_dispatcher_event_fd(stage->dispatcher), .events = POLLIN};
    CHECK(poll(&fd, 1, 0) == 0);
    shutdown(stage->kernel_fd, SHUT_WR);
    CHECK(poll(&fd, 1, 10000) == 1);
    CHECK(poll(&fd, 1, 0) == 1); /* for good */
    stage_free(stage);
}

static int count_descriptors(void)
{
    int n = 0;
    DIR *directory = opendir("/proc/self/fd");
    while (readdir(directory))
        n++;
    closedir(directory);
    return n;
}

int main(int argc, char **argv)
{
    unsigned n_rounds = argc > 1 ? (unsigned)atoi(argv[1]) : 100;
    int before = count_descriptors();
    test_init();
    test_malformed();
    test_many_callers(n_rounds);
    test_python_is_busy();
    for (unsigned i = 0; i < 10; i++) {
        test_stop_under_load();
        test_kernel_goes();
    }
    struct pbk_dispatcher *unused;
    struct pbk_dispatcher_options options = {.n_readers = 1000, .n_fsync = 1000, .log_fd = -1};
    CHECK(pbk_dispatcher_new(NULL, -1, &options, &unused) == 0);
    pbk_dispatcher_free(unused);
    pbk_dispatcher_free(NULL);
    CHECK(count_descriptors() == before);
    puts("dispatcher: ok");
    return 0;
}

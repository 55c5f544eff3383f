/*
 * Requests of the kernel, one after the other, as a reader takes them: opcode, node and length come from the input, and so
 * does whether the message says its true length. Answers go nowhere; what Python would get has to be a whole message.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <sys/socket.h>

#include "../src/dispatcher_reader.c"
#include "fuzz_place.h"
#include "pbk/nodes.h"

#define N_BLOCKS 16u

static void drain(struct pbk_dispatcher *d)
{
    static uint8_t message[PBK_FUSE_BUFFER];
    for (;;) {
        ssize_t got = recv(d->peer_fd, message, sizeof message, MSG_DONTWAIT);
        if (got < 0)
            return;
        struct fuse_in_header header;
        CHECK((size_t)got >= sizeof header);
        memcpy(&header, message, sizeof header);
        CHECK(header.len == (size_t)got);
    }
}

static void free_jobs(struct pbk_job *job)
{
    while (job) {
        struct pbk_job *next = job->next;
        free(job);
        job = next;
    }
}

/* What stop does for a dispatcher whose threads ran. */
static void forget(struct pbk_dispatcher *d)
{
    for (struct pbk_request *request = pbk_pending_close(&d->pending), *next; request; request = next) {
        next = request->next;
        free(request->job);
        free(request);
    }
    free_jobs(d->pool.fsync_head);
    free_jobs(d->pool.retry_head);
    free_jobs(d->pool.held_head);
    CHECK(d->outbox.head == NULL);
}

static struct pbk_nodes *make_nodes(void)
{
    static int objects_fd = -1;
    if (objects_fd < 0)
        objects_fd = openat(open_place(), "objects", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    struct pbk_nodes *nodes = pbk_nodes_new(NULL, objects_fd, -1, 1 << 20);
    struct pbk_ctx *ctx = pbk_ctx_new(N_BLOCKS * PBK_BLCKSZ);
    uint8_t page[PBK_BLCKSZ] = {1};
    CHECK(nodes != NULL && ctx != NULL);
    write_place("stored", page, sizeof page);
    struct pbk_source_spec spec = {
        .kind = PBK_SOURCE_RAW, .dir_fd = place_fd, .path = "stored", .label = "fuzz", .size = sizeof page};
    write_place("objects/01/1", page, sizeof page);
    for (uint64_t ino = 2; ino <= 3; ino++)
        CHECK(pbk_nodes_add(nodes, ino, sizeof page, &spec, 1) == 0 && pbk_nodes_publish(nodes, ino) == 0);
    struct pbk_node *node = pbk_nodes_get_any(nodes, 2);
    struct pbk_attach attach = {.object = 1, .limit = PBK_NO_LIMIT, .is_mapped = true};
    CHECK(pbk_node_attach(node, ctx, &attach) == 0);
    pbk_node_put(node);
    /* Nothing is allocated behind the end of a file, whatever is asked for. */
    pbk_nodes_set_reserve(nodes, UINT64_C(1) << 62);
    pbk_ctx_free(ctx);
    return nodes;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    struct input in = {data, n};
    struct pbk_nodes *nodes = make_nodes();
    struct pbk_dispatcher_options options = {.n_readers = 1, .n_fsync = 1, .log_fd = -1};
    struct pbk_dispatcher *d;
    int null_fd = open("/dev/null", O_RDWR | O_CLOEXEC);
    CHECK(null_fd >= 0 && pbk_dispatcher_new(nodes, null_fd, &options, &d) == 0);
    struct pbk_worker *worker = &d->readers[0];
    worker->dispatcher = d;
    worker->ctx = pbk_ctx_new(PBK_FUSE_MAX_IO);
    CHECK(worker->ctx != NULL);
    for (uint64_t unique = 2; in.n > 0; unique += 2) {
        struct fuse_in_header header = {.unique = unique};
        uint8_t flags = take_u8(&in);
        header.opcode = take_u8(&in) & 63;
        header.nodeid = flags & 3;
        size_t body_n = take_u16(&in);
        uint8_t *body = take_copy(&in, &body_n);
        size_t length = sizeof header + body_n;
        header.len = (uint32_t)(flags & 4 ? length + 1 : length);
        size_t sent = flags & 8 && body_n == 0 ? sizeof header - 1 : length;
        worker->buffer = malloc(length);
        CHECK(worker->buffer != NULL);
        memcpy(worker->buffer, &header, sizeof header);
        memcpy(worker->buffer + sizeof header, body, body_n);
        take_request(worker, sent);
        free(worker->buffer);
        worker->buffer = NULL;
        free(body);
        drain(d);
    }
    forget(d);
    pbk_ctx_free(worker->ctx);
    worker->ctx = NULL;
    pbk_dispatcher_free(d);
    pbk_nodes_free(nodes);
    close(null_fd);
    return 0;
}

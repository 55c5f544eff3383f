/*
 * A stored data file: the walk over its records, then the reads of a node that lies on it. The first byte chooses compression
 * and format, the second and third how long the list says that the file is.
 */
#define _GNU_SOURCE
#include <errno.h>

#include "fuzz_place.h"
#include "pbk/node.h"
#include "pbk/nodes.h"
#include "pbk/pagestream.h"

#define N_BLOCKS 32u
#define N_IOV (N_BLOCKS + 8)

static int check_record(void *arg, const struct pbk_page_record *record)
{
    const uint64_t *stored_size = arg;
    CHECK(record->length >= 1 && record->length <= PBK_BLCKSZ && record->block < PBK_MAX_SEGMENT_BLOCKS);
    CHECK(record->pos + PBK_RECORD_HEADER + record->length <= *stored_size);
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    struct input in = {data, n};
    uint8_t flags = take_u8(&in);
    uint16_t listed = take_u16(&in);
    uint64_t stored_size = flags & 16 ? listed : in.n;
    write_place("stored", in.data, in.n);
    int fd = openat(place_fd, "stored", O_RDONLY | O_CLOEXEC);
    struct pbk_page_walk walk;
    CHECK(fd >= 0);
    int walked = pbk_pages_walk(fd, stored_size, flags & 4, check_record, &stored_size, &walk);
    CHECK(walked == 0 || (walked == -EBADMSG && walk.reason != NULL));
    close(fd);

    struct pbk_nodes *nodes = pbk_nodes_new(NULL, place_fd, -1, 1 << 20);
    struct pbk_ctx *ctx = pbk_ctx_new(N_BLOCKS * PBK_BLCKSZ);
    CHECK(nodes != NULL && ctx != NULL);
    struct pbk_source_spec spec = {
        .kind = PBK_SOURCE_PAGES,
        .dir_fd = place_fd,
        .path = "stored",
        .label = "fuzz",
        .size = stored_size,
        .limit = N_BLOCKS,
        .compress = flags & 3 ? (flags & 3) - 1 : 0,
        .is_padded = flags & 4,
        .is_zlib_8192 = flags & 8,
    };
    CHECK(pbk_nodes_add(nodes, 1, (uint64_t)N_BLOCKS * PBK_BLCKSZ, &spec, 1) == 0);
    struct pbk_node *node = pbk_nodes_get_any(nodes, 1);
    if (flags & 32)
        CHECK(pbk_node_verify(node, 0, flags & 64) == 0);
    struct iovec iov[N_IOV];
    int n_iov;
    for (uint64_t off = 0; off < (uint64_t)N_BLOCKS * PBK_BLCKSZ; off += 4 * PBK_BLCKSZ) {
        ssize_t r = pbk_node_read(node, ctx, off + 100, 4 * PBK_BLCKSZ - 100, iov, (int)N_IOV, &n_iov);
        CHECK(r == -EIO || r == (ssize_t)(4 * PBK_BLCKSZ - 100));
        static volatile uint8_t sum; /* each byte of the answer is one that may be read */
        for (int i = 1; r > 0 && i < n_iov; i++)
            for (size_t k = 0; k < iov[i].iov_len; k++)
                sum = (uint8_t)(sum + ((const uint8_t *)iov[i].iov_base)[k]);
    }
    pbk_node_put(node);
    pbk_ctx_free(ctx);
    pbk_nodes_free(nodes);
    return 0;
}

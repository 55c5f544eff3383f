/*
 * The core without an interpreter, for the sanitizers: mutated input for everything that reads what others wrote, and threads
 * that read, write, cut, sync, drop indexes and close the gate at the same time. What is right byte by byte is compared with
 * a model in tests/native.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <linux/falloc.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>
#include <zlib.h>

#include "check.h"
#include "node_private.h"
#include "pbk/bytes.h"
#include "pbk/crc32c.h"
#include "pbk/inflate.h"
#include "pbk/io.h"
#include "pbk/journal.h"
#include "pbk/node.h"
#include "pbk/nodes.h"
#include "pbk/pagestream.h"
#include "pbk/pglz.h"

#define HALF (PBK_BLCKSZ / 2)

/* ---- numbers and files ---- */

static uint64_t next_random(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

static uint32_t below(uint64_t *state, uint32_t n)
{
    return (uint32_t)(next_random(state) % n);
}

static char directory[4096];

static int remove_entry(const char *path, const struct stat *st, int flag, struct FTW *ftw)
{
    (void)st;
    (void)flag;
    (void)ftw;
    return remove(path);
}

static void remove_directory(void)
{
    nftw(directory, remove_entry, 16, FTW_DEPTH | FTW_PHYS);
}

static int open_directory(void)
{
    int fd = open(directory, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    CHECK(fd >= 0);
    return fd;
}

static int make_file(const char *name, const void *bytes, size_t n)
{
    char path[8192];
    snprintf(path, sizeof(path), "%s/%s", directory, name);
    int fd = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    CHECK(fd >= 0);
    CHECK(pbk_pwrite_full(fd, bytes, n, 0) == 0);
    return fd;
}

static void make_object(uint64_t id, uint64_t size)
{
    char path[8192];
    snprintf(path, sizeof(path), "%s/objects/%02x", directory, (unsigned)(id & 255));
    CHECK(mkdir(path, 0700) == 0 || errno == EEXIST);
    snprintf(path, sizeof(path), "%s/objects/%02x/%llx", directory, (unsigned)(id & 255), (unsigned long long)id);
    int fd = open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    CHECK(fd >= 0 && ftruncate(fd, (off_t)size) == 0);
    close(fd);
}

/* ---- checksums ---- */

static void test_crc32c(void)
{
    uint64_t seed = 1;
    uint8_t bytes[1024];
    for (size_t i = 0; i < sizeof(bytes); i++)
        bytes[i] = (uint8_t)next_random(&seed);
    CHECK(pbk_crc32c(0, "123456789", 9) == 0xE3069283u);
    for (unsigned i = 0; i < 2000; i++) {
        size_t from = below(&seed, 64);
        size_t n = below(&seed, (uint32_t)(sizeof(bytes) - from));
        size_t cut = below(&seed, (uint32_t)n + 1);
        uint32_t whole = pbk_crc32c_table(0, bytes + from, n);
        CHECK(pbk_crc32c(0, bytes + from, n) == whole);
        CHECK(pbk_crc32c(pbk_crc32c(0, bytes + from, cut), bytes + from + cut, n - cut) == whole);
    }
}

/* ---- mutated input ---- */

/* Copies that end where their allocation ends, so that AddressSanitizer sees a read of one byte more. */
static uint8_t *mutate(uint64_t *seed, const uint8_t *bytes, size_t n, size_t *mutated_n)
{
    *mutated_n = below(seed, 4) == 0 ? below(seed, (uint32_t)n + 1) : n;
    uint8_t *copy = malloc(*mutated_n ? *mutated_n : 1);
    CHECK(copy != NULL);
    memcpy(copy, bytes, *mutated_n);
    for (unsigned k = below(seed, 4); k > 0 && *mutated_n > 0; k--) {
        size_t at = below(seed, (uint32_t)*mutated_n);
        copy[at] = (uint8_t)(below(seed, 2) ? next_random(seed) : copy[at] ^ 1u << below(seed, 8));
    }
    return copy;
}

static void test_pglz_damage(void)
{
    uint64_t seed = 2;
    /* 8 literals, then matches with all kinds of overlap. */
    uint8_t good[4096];
    size_t n = 0;
    size_t out = 8;
    good[n++] = 0;
    for (unsigned i = 0; i < 8; i++)
        good[n++] = (uint8_t)i;
    while (out + 8 * 40 <= PBK_BLCKSZ) {
        good[n++] = 0xFF;
        for (unsigned i = 0; i < 8; i++) {
            unsigned distance = 1 + below(&seed, out > 4095 ? 4095 : (uint32_t)out);
            good[n++] = (uint8_t)(0x0F | (distance >> 4 & 0xF0));
            good[n++] = (uint8_t)distance;
            good[n++] = 22;
            out += 40;
        }
    }
    uint8_t *page = malloc(out);
    CHECK(page != NULL && pbk_pglz_decompress(good, n, page, out) == 0);
    for (unsigned i = 0; i < 20000; i++) {
        size_t m;
        uint8_t *bad = mutate(&seed, good, n, &m);
        int err = pbk_pglz_decompress(bad, m, page, out);
        CHECK(err == 0 || err == -EIO);
        free(bad);
    }
    free(page);
}

static size_t put_record(uint8_t *to, uint32_t block, const uint8_t *payload, uint32_t n)
{
    pbk_put_u32(to, block);
    pbk_put_u32(to + 4, n);
    memcpy(to + 8, payload, n);
    return 8 + (size_t)n;
}

static int check_record(void *arg, const struct pbk_page_record *record)
{
    uint64_t *stored_size = arg;
    CHECK(record->length >= 1 && record->length <= PBK_BLCKSZ);
    CHECK(record->block < PBK_MAX_SEGMENT_BLOCKS);
    CHECK(record->pos + 8 + record->length <= *stored_size);
    return 0;
}

static void test_page_stream_damage(void)
{
    uint64_t seed = 3;
    uint8_t stream[40 * 100];
    uint8_t entries[41 * 24] = {0};
    uint8_t packed[2048];
    uint8_t payload[64] = {0};
    size_t n = 0;
    for (uint32_t i = 0; i < 40; i++) {
        pbk_put_u32(entries + (size_t)i * 24 + 8, i * 3);
        pbk_put_u32(entries + (size_t)i * 24 + 12, (uint32_t)n);
        n += put_record(stream + n, i * 3, payload, 20 + i % 40);
    }
    pbk_put_u32(entries + 40 * 24 + 12, (uint32_t)n);
    struct pbk_inflater *inflater = pbk_inflater_new();
    CHECK(inflater != NULL);
    for (unsigned i = 0; i < 4000; i++) {
        struct pbk_page_walk walk;
        size_t m;
        uint8_t *bad = mutate(&seed, stream, n, &m);
        uint64_t stored_size = below(&seed, 3) ? m : below(&seed, 5000);
        int fd = make_file("stream", bad, m);
        int err = pbk_pages_walk(fd, stored_size, below(&seed, 2), check_record, &stored_size, &walk);
        CHECK(err == 0 || (err == -EBADMSG && walk.reason != NULL));
        close(fd);
        free(bad);

        /* Damage before the compression gets past the inflater, damage behind it mostly does not. */
        uint8_t *bad_entries = mutate(&seed, entries, sizeof(entries), &m);
        uLongf packed_n = sizeof(packed);
        CHECK(compress(packed, &packed_n, bad_entries, m) == Z_OK);
        uint32_t crc = pbk_crc32c(0, bad_entries, m);
        free(bad_entries);
        size_t packed_m = packed_n;
        uint8_t *bad_packed = packed;
        bool is_mutated = below(&seed, 2);
        if (is_mutated)
            bad_packed = mutate(&seed, packed, packed_n, &packed_m);
        fd = make_file("map", bad_packed, packed_m);
        stored_size = n;
        err = pbk_headermap_walk(fd, below(&seed, 20) ? 0 : (int64_t)next_random(&seed),
                                 below(&seed, 20) ? (int64_t)packed_m : (int64_t)next_random(&seed), crc,
                                 below(&seed, 20) ? 40 : (uint32_t)next_random(&seed), stored_size, inflater,
                                 check_record, &stored_size, &walk);
        CHECK(err == 0 || (err == -EBADMSG && walk.reason != NULL) || err == -EFBIG);
        close(fd);
        if (is_mutated)
            free(bad_packed);
    }
    pbk_inflater_free(inflater);
}

static size_t put_frame(uint8_t *to, const uint8_t *payload, size_t n)
{
    pbk_put_u32(to + 4, (uint32_t)n);
    memcpy(to + 8, payload, n);
    pbk_put_u32(to, pbk_crc32c(0, to + 4, n + 4));
    return 8 + n;
}

static int count_names(void *arg, const uint8_t *payload, size_t n)
{
    CHECK(payload[0] >= PBK_RECORD_FIRST_NAME && n >= 1);
    ++*(unsigned *)arg;
    return 0;
}

static void test_journal_damage(void)
{
    static const uint8_t session[16] = {7};
    uint64_t seed = 4;
    for (unsigned i = 0; i < 3000; i++) {
        uint8_t file[4096] = "PBKFSJNL\1";
        size_t n = PBK_JOURNAL_HEADER;
        for (unsigned k = 0; k < 12; k++) {
            uint8_t payload[64];
            size_t length = 1 + below(&seed, 60);
            for (size_t j = 0; j < length; j++)
                payload[j] = (uint8_t)next_random(&seed);
            payload[0] = (uint8_t)below(&seed, 20);
            if (payload[0] == PBK_RECORD_PAGES || payload[0] == PBK_RECORD_PAGES_LIVE) {
                uint32_t n_ranges = below(&seed, 4);
                length = 13 + 8 * (size_t)n_ranges;
                pbk_put_u64(payload + 1, below(&seed, 3));
                pbk_put_u32(payload + 9, n_ranges);
                for (uint32_t r = 0; r < n_ranges; r++) {
                    pbk_put_u32(payload + 13 + (size_t)r * 8, below(&seed, 1000));
                    pbk_put_u32(payload + 17 + (size_t)r * 8, 1 + below(&seed, 100));
                }
            } else if (payload[0] == PBK_RECORD_LIMIT) {
                length = 13;
                pbk_put_u64(payload + 1, below(&seed, 3));
            } else if (payload[0] == PBK_RECORD_SESSION) {
                length = 17;
                memcpy(payload + 1, session, 16);
            }
            n += put_frame(file + n, payload, length);
        }
        size_t m;
        uint8_t *bad = mutate(&seed, file, n, &m);
        int fd = make_file("journal", bad, m);
        unsigned n_names = 0;
        struct pbk_journal_scan scan;
        int err = pbk_journal_scan(fd, session, count_names, &n_names, &scan);
        CHECK(err == 0 || err == -EIO);
        CHECK(scan.end <= m || (err == -EIO && scan.end == 0));
        pbk_journal_scan_free(&scan);
        close(fd);
        free(bad);
    }
}

/* ---- threads ---- */

#define N_BLOCKS 400u
#define N_NODES 24u
#define BASE_STAMP 1000000u
#define N_ROUNDS 2500u

struct shared {
    struct pbk_nodes *nodes;
    struct pbk_journal *journal;
    atomic_uint n_running;
    /* What the two writers of node 1 wrote last: halves by the one, whole pages by the other. */
    uint32_t lower[N_BLOCKS];
    uint32_t upper[N_BLOCKS];
    uint64_t cut_at;              /* one thread's, read when it has ended */
    struct pbk_source_spec below; /* of all nodes */
};

static void fill_half(uint8_t *half, uint32_t stamp)
{
    for (size_t i = 0; i < HALF; i += 4)
        pbk_put_u32(half + i, stamp);
}

/* Every half has one stamp from its begin to its end: no request may see, or leave, parts of two. */
static uint32_t check_half(const uint8_t *half)
{
    uint32_t stamp = pbk_get_u32(half);
    CHECK(pbk_get_u32(half + HALF / 2) == stamp && pbk_get_u32(half + HALF - 4) == stamp);
    return stamp;
}

static struct pbk_node *get(struct shared *s, uint64_t ino)
{
    struct pbk_node *node = pbk_nodes_get_any(s->nodes, ino);
    CHECK(node != NULL);
    return node;
}

static void write_at(struct pbk_node *node, struct pbk_ctx *ctx, uint64_t off, const uint8_t *data, size_t n)
{
    CHECK(pbk_node_write(node, ctx, off, data, n) == (ssize_t)n);
}

/* Writes even halves only. Its halves and the other writer's upper halves meet in pages that are not yet in the object. */
static void *write_halves(void *arg)
{
    struct shared *s = arg;
    struct pbk_ctx *ctx = pbk_ctx_new(1 << 20);
    uint64_t seed = 5;
    uint8_t half[HALF];
    for (unsigned i = 0; i < N_ROUNDS; i++) {
        struct pbk_node *node = get(s, 1);
        uint32_t b = i < N_BLOCKS ? i : below(&seed, N_BLOCKS);
        s->lower[b] = i + 1;
        fill_half(half, s->lower[b]);
        write_at(node, ctx, (uint64_t)b * PBK_BLCKSZ, half, HALF);
        pbk_node_put(node);
    }
    pbk_ctx_free(ctx);
    atomic_fetch_sub(&s->n_running, 1);
    return NULL;
}

static void *write_upper_halves(void *arg)
{
    struct shared *s = arg;
    struct pbk_ctx *ctx = pbk_ctx_new(1 << 20);
    uint64_t seed = 6;
    uint8_t half[HALF];
    for (unsigned i = 0; i < N_ROUNDS; i++) {
        struct pbk_node *node = get(s, 1);
        uint32_t b = i < N_BLOCKS ? i : below(&seed, N_BLOCKS);
        s->upper[b] = i + 1;
        fill_half(half, s->upper[b]);
        write_at(node, ctx, (uint64_t)b * PBK_BLCKSZ + HALF, half, HALF);
        pbk_node_put(node);
    }
    pbk_ctx_free(ctx);
    atomic_fetch_sub(&s->n_running, 1);
    return NULL;
}

/* Reads of all sizes; every half is of one piece. */
static void *read_all(void *arg)
{
    struct shared *s = arg;
    struct pbk_ctx *ctx = pbk_ctx_new(256 << 10);
    uint64_t seed = (uint64_t)(uintptr_t)&seed;
    struct iovec iov[40];
    uint8_t *bytes = malloc(256 << 10);
    CHECK(ctx != NULL && bytes != NULL);
    while (atomic_load(&s->n_running) > 0) {
        struct pbk_node *node = get(s, 1 + below(&seed, N_NODES));
        uint64_t off = (uint64_t)below(&seed, N_BLOCKS) * PBK_BLCKSZ;
        int n_iov;
        ssize_t r = pbk_node_read(node, ctx, off, (size_t)(1 + below(&seed, 32)) * PBK_BLCKSZ, iov,
                                  below(&seed, 2) ? 40 : 4, &n_iov);
        CHECK(r >= 0 && (pbk_node_ino(node) != 1 || r % HALF == 0)); /* the others are cut anywhere */
        size_t n = 0;
        for (int i = 1; i < n_iov; i++) {
            memcpy(bytes + n, iov[i].iov_base, iov[i].iov_len);
            n += iov[i].iov_len;
        }
        CHECK(n == (size_t)r);
        if (pbk_node_ino(node) == 1)
            for (size_t i = 0; i < n; i += HALF)
                check_half(bytes + i);
        pbk_node_put(node);
    }
    free(bytes);
    pbk_ctx_free(ctx);
    return NULL;
}

/* Some nodes get other sources that hold the same. */
static void restack(struct shared *s, uint64_t *seed)
{
    struct pbk_restack *all = NULL;
    uint64_t size = (uint64_t)N_BLOCKS * PBK_BLCKSZ;
    for (uint64_t ino = 1; ino <= N_NODES; ino += 1 + below(seed, 4))
        CHECK(pbk_nodes_prepare_restack(s->nodes, ino, size, &s->below, 1, &all) == 0);
    CHECK(pbk_nodes_prepare_restack(s->nodes, 1, size - 1, &s->below, 1, &all) == -EINVAL);
    CHECK(pbk_nodes_prepare_restack(s->nodes, N_NODES + 1, size, &s->below, 1, &all) == -ENOENT);
    if (below(seed, 8) == 0)
        pbk_nodes_cancel_restack(all);
    else
        pbk_nodes_restack(all);
}

/* Everything that runs beside: fsync, other files with all kinds of change, indexes dropped, the gate, new sources. */
static void *disturb(void *arg)
{
    struct shared *s = arg;
    struct pbk_ctx *ctx = pbk_ctx_new(64 << 10);
    uint64_t seed = 8;
    uint8_t page[PBK_BLCKSZ];
    struct stat st;
    CHECK(ctx != NULL);
    memset(page, 0x5A, sizeof(page));
    while (atomic_load(&s->n_running) > 0) {
        struct pbk_node *node = get(s, 2 + below(&seed, N_NODES - 1));
        uint64_t size = (uint64_t)below(&seed, N_BLOCKS) * PBK_BLCKSZ;
        switch (below(&seed, 10)) {
        case 0:
            CHECK(pbk_node_truncate(node, ctx, size) == 0);
            break;
        case 1:
            write_at(node, ctx, size, page, sizeof(page));
            break;
        case 2:
            write_at(node, ctx, size, page, HALF);
            break;
        case 3:
            CHECK(pbk_node_fsync(node, true) == 0);
            break;
        case 4:
            pbk_nodes_drop_indexes(s->nodes);
            break;
        case 5:
            pbk_nodes_gate_close(s->nodes);
            CHECK(pbk_nodes_gate_open(s->nodes) == 0);
            break;
        case 6:
            CHECK(pbk_node_fallocate(node, ctx, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, size, 3 * HALF) == 0);
            break;
        case 7:
            CHECK(pbk_node_stat(node, &st) == 0);
            pbk_node_opened(node);
            pbk_node_released(node);
            break;
        case 8:
            restack(s, &seed);
            break;
        default: {
            struct pbk_node *first = get(s, 1);
            CHECK(pbk_node_fsync(first, false) == 0);
            pbk_node_put(first);
            break;
        }
        }
        pbk_node_put(node);
    }
    pbk_ctx_free(ctx);
    return NULL;
}

/* Brings up what is missing of a node and records it; returns whether the node is whole then. */
static bool hydrate(struct pbk_node *node, struct pbk_ctx *ctx, uint64_t piece)
{
    for (uint64_t at = 0; at != UINT64_MAX;)
        CHECK(pbk_node_hydrate(node, ctx, at, piece, &at) >= 0);
    int r = pbk_node_hydrate_sync(node);
    CHECK(r == 0 || r == 1);
    return r == 1;
}

static void *hydrate_all(void *arg)
{
    struct shared *s = arg;
    struct pbk_ctx *ctx = pbk_ctx_new(1 << 20);
    CHECK(ctx != NULL);
    for (uint64_t ino = 1; ino <= N_NODES; ino++) {
        struct pbk_node *node = get(s, ino);
        struct pbk_block_counts counts;
        hydrate(node, ctx, 3 * PBK_BLCKSZ);
        pbk_node_count_blocks(node, &counts);
        CHECK(counts.n_changed <= counts.n_present && counts.n_present <= counts.n_blocks);
        pbk_node_put(node);
    }
    pbk_ctx_free(ctx);
    return NULL;
}

static void make_store(uint8_t **stream, size_t *n)
{
    uint8_t page[PBK_BLCKSZ];
    *stream = malloc((size_t)N_BLOCKS * (PBK_BLCKSZ + 8));
    CHECK(*stream != NULL);
    *n = 0;
    for (uint32_t b = 0; b < N_BLOCKS; b++) {
        fill_half(page, BASE_STAMP + b);
        fill_half(page + HALF, BASE_STAMP + b);
        uint8_t packed[PBK_BLCKSZ];
        uLongf packed_n = sizeof(packed);
        if (b % 3 == 0)
            *n += put_record(*stream + *n, b, page, PBK_BLCKSZ);
        else if (compress(packed, &packed_n, page, sizeof(page)) == Z_OK)
            *n += put_record(*stream + *n, b, packed, (uint32_t)packed_n);
    }
}

static void test_threads(void)
{
    struct shared s = {0};
    uint8_t *stream;
    size_t n;
    pthread_t threads[6];
    void *(*const mains[6])(void *) = {write_halves, write_upper_halves, read_all, read_all, disturb, hydrate_all};
    uint8_t header[PBK_JOURNAL_HEADER] = "PBKFSJNL\1";

    make_store(&stream, &n);
    close(make_file("data", stream, n));
    free(stream);
    int root = open_directory();
    CHECK(mkdirat(root, "objects", 0700) == 0);
    int objects = openat(root, "objects", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    int journal_fd = make_file("journal", header, sizeof(header));
    s.journal = pbk_journal_new(journal_fd, sizeof(header));
    /* Room for two indexes, so that they come and go. */
    s.nodes = pbk_nodes_new(s.journal, objects, -1, 2 * 8 * N_BLOCKS + 300);
    CHECK(s.nodes != NULL && s.journal != NULL);
    struct pbk_ctx *ctx = pbk_ctx_new(1 << 20);
    for (uint64_t ino = 1; ino <= N_NODES; ino++) {
        struct pbk_source_spec spec = {.kind = PBK_SOURCE_PAGES,
                                       .dir_fd = root,
                                       .path = "data",
                                       .label = "FULL",
                                       .size = n,
                                       .limit = PBK_NO_LIMIT,
                                       .compress = PBK_COMPRESS_ZLIB};
        uint64_t size = (uint64_t)N_BLOCKS * PBK_BLCKSZ;
        s.below = spec;
        CHECK(pbk_nodes_add(s.nodes, ino, size, &spec, 1) == 0);
        CHECK(pbk_nodes_add(s.nodes, ino, size, &spec, 1) == -EEXIST);
        struct pbk_node *node = get(&s, ino);
        CHECK(pbk_node_write(node, ctx, 0, "x", 1) == PBK_NO_OBJECT);
        make_object(ino * 256, size);
        struct pbk_attach attach = {.object = ino * 256, .limit = PBK_NO_LIMIT, .is_mapped = true, .is_fresh = true};
        CHECK(pbk_node_attach(node, ctx, &attach) == 0);
        pbk_node_put(node);
    }
    atomic_store(&s.n_running, 2);
    for (unsigned i = 0; i < 6; i++)
        CHECK(pthread_create(&threads[i], NULL, mains[i], &s) == 0);
    for (unsigned i = 0; i < 6; i++)
        pthread_join(threads[i], NULL);

    struct pbk_node *node = get(&s, 1);
    struct iovec iov[2];
    int n_iov;
    for (uint32_t b = 0; b < N_BLOCKS; b++) {
        CHECK(pbk_node_read(node, ctx, (uint64_t)b * PBK_BLCKSZ, PBK_BLCKSZ, iov, 2, &n_iov) == PBK_BLCKSZ);
        CHECK(check_half(iov[1].iov_base) == s.lower[b]);
        CHECK(check_half((uint8_t *)iov[1].iov_base + HALF) == s.upper[b]);
    }
    CHECK(pbk_node_fsync(node, true) == 0);
    pbk_node_put(node);

    /* The journal says the same: every block of node 1 is durable. */
    struct pbk_journal_scan scan;
    static const uint8_t no_session[16];
    CHECK(pbk_journal_scan(journal_fd, no_session, NULL, NULL, &scan) == 0);
    CHECK(scan.end == pbk_journal_end(s.journal) && pbk_journal_synced(s.journal) == scan.end);
    bool is_found = false;
    for (size_t i = 0; i < scan.n_maps; i++) {
        if (scan.maps[i].object != 256)
            continue;
        is_found = true;
        for (uint32_t b = 0; b < N_BLOCKS; b++)
            CHECK(scan.maps[i].changed.words[b / 64] >> (b % 64) & 1);
    }
    CHECK(is_found);
    pbk_journal_scan_free(&scan);

    struct pbk_counter counters[64];
    size_t n_counters = pbk_nodes_counters(s.nodes, counters, 64);
    CHECK(n_counters > 10 && n_counters < 64);
    pbk_ctx_free(ctx);
    pbk_nodes_free(s.nodes);
    pbk_journal_free(s.journal);
    close(journal_fd);
    close(objects);
    close(root);
}

/* Whole pages against halves of the same pages: the halves that only the first writer touches must be its own. */
static void *write_whole_pages(void *arg)
{
    struct shared *s = arg;
    struct pbk_ctx *ctx = pbk_ctx_new(1 << 20);
    uint8_t *pages = malloc(4 * PBK_BLCKSZ);
    CHECK(ctx != NULL && pages != NULL);
    for (uint32_t b = 0; b + 4 <= N_BLOCKS; b += 4) {
        struct pbk_node *node = get(s, 1);
        for (uint32_t k = 0; k < 8; k++)
            fill_half(pages + (size_t)k * HALF, 1);
        write_at(node, ctx, (uint64_t)b * PBK_BLCKSZ, pages, 4 * PBK_BLCKSZ);
        pbk_node_put(node);
    }
    free(pages);
    pbk_ctx_free(ctx);
    return NULL;
}

static void *write_some_halves(void *arg)
{
    struct shared *s = arg;
    struct pbk_ctx *ctx = pbk_ctx_new(1 << 20);
    uint8_t half[HALF];
    fill_half(half, 2);
    for (uint32_t b = 0; b < N_BLOCKS; b++) {
        struct pbk_node *node = get(s, 1);
        write_at(node, ctx, (uint64_t)b * PBK_BLCKSZ, half, HALF);
        pbk_node_put(node);
    }
    pbk_ctx_free(ctx);
    return NULL;
}

static void test_whole_against_half(void)
{
    uint8_t *stream;
    size_t n;
    make_store(&stream, &n);
    close(make_file("data", stream, n));
    free(stream);
    int root = open_directory();
    int objects = openat(root, "objects", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    for (unsigned round = 0; round < 8; round++) {
        struct shared s = {.nodes = pbk_nodes_new(NULL, objects, -1, 1 << 20)};
        struct pbk_ctx *ctx = pbk_ctx_new(1 << 20);
        pthread_t threads[2];
        uint64_t size = (uint64_t)N_BLOCKS * PBK_BLCKSZ;
        struct pbk_source_spec spec = {.kind = PBK_SOURCE_PAGES,
                                       .dir_fd = root,
                                       .path = "data",
                                       .label = "FULL",
                                       .size = n,
                                       .limit = PBK_NO_LIMIT,
                                       .compress = PBK_COMPRESS_ZLIB};
        CHECK(pbk_nodes_add(s.nodes, 1, size, &spec, 1) == 0);
        make_object(1000000 + round, size);
        struct pbk_attach attach = {.object = 1000000 + round, .limit = PBK_NO_LIMIT, .is_mapped = true};
        struct pbk_node *node = get(&s, 1);
        CHECK(pbk_node_attach(node, ctx, &attach) == 0);
        CHECK(pthread_create(&threads[0], NULL, write_whole_pages, &s) == 0);
        CHECK(pthread_create(&threads[1], NULL, write_some_halves, &s) == 0);
        pthread_join(threads[0], NULL);
        pthread_join(threads[1], NULL);
        for (uint32_t b = 0; b < N_BLOCKS; b++) {
            struct iovec iov[2];
            int n_iov;
            CHECK(pbk_node_read(node, ctx, (uint64_t)b * PBK_BLCKSZ, PBK_BLCKSZ, iov, 2, &n_iov) == PBK_BLCKSZ);
            CHECK(check_half((uint8_t *)iov[1].iov_base + HALF) == 1);
        }
        pbk_node_put(node);
        pbk_ctx_free(ctx);
        pbk_nodes_free(s.nodes);
    }
    close(objects);
    close(root);
}

/* Cuts node 2 shorter and shorter, and lets it grow again each time. */
static void *cut_and_grow(void *arg)
{
    struct shared *s = arg;
    struct pbk_ctx *ctx = pbk_ctx_new(64 << 10);
    uint64_t full = (uint64_t)N_BLOCKS * PBK_BLCKSZ;
    CHECK(ctx != NULL);
    for (uint64_t size = full - 100; size > full / 2; size -= 3 * PBK_BLCKSZ + 100) {
        struct pbk_node *node = get(s, 2);
        CHECK(pbk_node_truncate(node, ctx, size) == 0);
        CHECK(pbk_node_truncate(node, ctx, full) == 0);
        s->cut_at = size;
        pbk_node_put(node);
    }
    pbk_ctx_free(ctx);
    return NULL;
}

/* Whatever the order: what was written stays, what was cut off stays away, and all else is as it was below. */
static void check_hydrated(struct shared *s, struct pbk_ctx *ctx)
{
    struct pbk_block_counts counts;
    for (uint64_t ino = 1; ino <= 2; ino++) {
        struct pbk_node *node = get(s, ino);
        CHECK(hydrate(node, ctx, 1 << 20));
        pbk_node_count_blocks(node, &counts);
        CHECK(counts.is_whole && counts.n_present == counts.n_blocks);
        CHECK(ino == 2 ? counts.n_blocks == (s->cut_at + PBK_BLCKSZ - 1) / PBK_BLCKSZ : counts.n_changed == N_BLOCKS);
        for (uint32_t b = 0; b < N_BLOCKS; b++) {
            struct iovec iov[2];
            int n_iov;
            uint8_t page[PBK_BLCKSZ];
            fill_half(page, ino == 1 ? 2 : BASE_STAMP + b);
            fill_half(page + HALF, BASE_STAMP + b);
            uint64_t at = (uint64_t)b * PBK_BLCKSZ;
            if (ino == 2 && at + PBK_BLCKSZ > s->cut_at) {
                size_t keep = at < s->cut_at ? (size_t)(s->cut_at - at) : 0;
                memset(page + keep, 0, sizeof(page) - keep);
            }
            CHECK(pbk_node_read(node, ctx, at, PBK_BLCKSZ, iov, 2, &n_iov) == PBK_BLCKSZ);
            CHECK(memcmp(iov[1].iov_base, page, sizeof(page)) == 0);
        }
        pbk_node_put(node);
    }
}

static void test_hydration(void)
{
    uint8_t *stream;
    size_t n;
    make_store(&stream, &n);
    close(make_file("data", stream, n));
    free(stream);
    int root = open_directory();
    int objects = openat(root, "objects", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    uint8_t header[PBK_JOURNAL_HEADER] = "PBKFSJNL\1";
    for (unsigned round = 0; round < 6; round++) {
        int journal_fd = make_file("journal", header, sizeof(header));
        struct shared s = {.journal = pbk_journal_new(journal_fd, sizeof(header))};
        s.nodes = pbk_nodes_new(s.journal, objects, -1, 1 << 20);
        struct pbk_ctx *ctx = pbk_ctx_new(1 << 20);
        CHECK(s.journal != NULL && s.nodes != NULL && ctx != NULL);
        for (uint64_t ino = 1; ino <= N_NODES; ino++) {
            struct pbk_source_spec spec = {.kind = PBK_SOURCE_PAGES,
                                           .dir_fd = root,
                                           .path = "data",
                                           .label = "FULL",
                                           .size = n,
                                           .limit = PBK_NO_LIMIT,
                                           .compress = PBK_COMPRESS_ZLIB};
            uint64_t size = (uint64_t)N_BLOCKS * PBK_BLCKSZ;
            CHECK(pbk_nodes_add(s.nodes, ino, size, &spec, 1) == 0);
            struct pbk_attach attach = {
                .object = 2000000 + round * 256 + ino, .limit = PBK_NO_LIMIT, .is_mapped = true, .is_fresh = true};
            make_object(attach.object, size);
            struct pbk_node *node = get(&s, ino);
            CHECK(pbk_node_attach(node, ctx, &attach) == 0);
            pbk_node_put(node);
        }
        pthread_t threads[4];
        void *(*const mains[4])(void *) = {hydrate_all, hydrate_all, write_some_halves, cut_and_grow};
        for (unsigned i = 0; i < 4; i++)
            CHECK(pthread_create(&threads[i], NULL, mains[i], &s) == 0);
        for (unsigned i = 0; i < 4; i++)
            pthread_join(threads[i], NULL);
        check_hydrated(&s, ctx);
        pbk_ctx_free(ctx);
        pbk_nodes_free(s.nodes);
        pbk_journal_free(s.journal);
        close(journal_fd);
    }
    close(objects);
    close(root);
}

/* ---- sealing ---- */

#define N_SEALS 12u
#define N_SEAL_ROUNDS 1500u

/* Layers one upon the other: the last one is written to. */
struct layers {
    struct shared s;
    pthread_mutex_t attach_lock; /* copying up and sealing are one thread's in a mount */
    uint64_t next_object;
    unsigned n; /* attach_lock */
    int objects[N_SEALS + 1];
    int journal_fds[N_SEALS + 1];
    struct pbk_journal *journals[N_SEALS + 1];
    uint64_t sealed_ends[N_SEALS];
    uint32_t sealed_crcs[N_SEALS];
    atomic_bool is_done;
};

static void make_layer(struct layers *l, unsigned number)
{
    char name[64];
    uint8_t header[PBK_JOURNAL_HEADER] = "PBKFSJNL\1";
    int root = open_directory();
    snprintf(name, sizeof(name), "layer%u.journal", number);
    l->journal_fds[number] = make_file(name, header, sizeof(header));
    l->journals[number] = pbk_journal_new(l->journal_fds[number], sizeof(header));
    snprintf(name, sizeof(name), "layer%u", number);
    CHECK(mkdirat(root, name, 0700) == 0);
    l->objects[number] = openat(root, name, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    CHECK(l->journals[number] != NULL && l->objects[number] >= 0);
    close(root);
}

/* What Python does for a write that found no object. */
static void copy_up(struct layers *l, struct pbk_node *node, struct pbk_ctx *ctx)
{
    char name[32];
    pthread_mutex_lock(&l->attach_lock);
    if (!pbk_node_has_object(node)) {
        uint64_t id = l->next_object++;
        int objects = l->objects[l->n];
        snprintf(name, sizeof(name), "%02x", (unsigned)(id & 255));
        CHECK(mkdirat(objects, name, 0700) == 0 || errno == EEXIST);
        snprintf(name, sizeof(name), "%02x/%llx", (unsigned)(id & 255), (unsigned long long)id);
        int fd = openat(objects, name, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
        CHECK(fd >= 0 && ftruncate(fd, (off_t)pbk_node_size(node)) == 0);
        close(fd);
        struct pbk_attach attach = {.object = id, .limit = PBK_NO_LIMIT, .is_mapped = true, .is_fresh = true};
        CHECK(pbk_node_attach(node, ctx, &attach) == 0);
    }
    pthread_mutex_unlock(&l->attach_lock);
}

static void write_up(struct layers *l, struct pbk_node *node, struct pbk_ctx *ctx, uint64_t off, const uint8_t *data)
{
    ssize_t r;
    while ((r = pbk_node_write(node, ctx, off, data, HALF)) == PBK_NO_OBJECT)
        copy_up(l, node, ctx);
    CHECK(r == HALF);
}

static void *write_under_seals(void *arg, uint32_t *stamps, uint64_t at, uint64_t seed)
{
    struct layers *l = arg;
    struct pbk_ctx *ctx = pbk_ctx_new(64 << 10);
    uint8_t half[HALF];
    CHECK(ctx != NULL);
    for (unsigned i = 0; i < N_SEAL_ROUNDS || !atomic_load(&l->is_done); i++) {
        struct pbk_node *node = get(&l->s, 1);
        uint32_t b = i < N_BLOCKS ? i : below(&seed, N_BLOCKS);
        stamps[b] = i + 1;
        fill_half(half, stamps[b]);
        write_up(l, node, ctx, (uint64_t)b * PBK_BLCKSZ + at, half);
        pbk_node_put(node);
    }
    pbk_ctx_free(ctx);
    atomic_fetch_sub(&l->s.n_running, 1);
    return NULL;
}

static void *write_lower_under_seals(void *arg)
{
    return write_under_seals(arg, ((struct layers *)arg)->s.lower, 0, 15);
}

static void *write_upper_under_seals(void *arg)
{
    return write_under_seals(arg, ((struct layers *)arg)->s.upper, HALF, 16);
}

/* Other nodes are cut, grown, hydrated, described; all are synced. */
static void *disturb_seals(void *arg)
{
    struct layers *l = arg;
    struct pbk_ctx *ctx = pbk_ctx_new(1 << 20);
    uint64_t seed = 17;
    uint8_t half[HALF] = {0};
    struct stat st;
    CHECK(ctx != NULL);
    while (atomic_load(&l->s.n_running) > 0) {
        struct pbk_node *node = get(&l->s, 1 + below(&seed, N_NODES));
        struct pbk_node *other = get(&l->s, 2 + below(&seed, N_NODES - 1));
        struct pbk_page_map map;
        uint64_t size = (uint64_t)below(&seed, N_BLOCKS) * PBK_BLCKSZ + below(&seed, 2) * 100;
        uint64_t next = 0;
        int err;
        switch (below(&seed, 8)) {
        case 0:
            CHECK(pbk_node_fsync(node, true) == 0);
            break;
        case 1:
            CHECK(pbk_nodes_sync(l->s.nodes) == 0);
            break;
        case 2:
            err = pbk_node_truncate(other, ctx, size);
            CHECK(err == 0 || err == PBK_NO_OBJECT);
            break;
        case 3:
            write_up(l, other, ctx, size, half);
            break;
        case 4:
            err = pbk_node_describe(node, &st);
            CHECK(err == 0 || err == PBK_NO_OBJECT);
            break;
        case 5: {
            ssize_t r = pbk_node_hydrate(other, ctx, 0, 4 * PBK_BLCKSZ, &next);
            CHECK(r >= 0 || r == PBK_NO_OBJECT);
            err = pbk_node_hydrate_sync(other);
            CHECK(err >= 0 || err == PBK_NO_OBJECT);
            break;
        }
        case 6:
            err = pbk_node_page_map(node, &map);
            CHECK(err == 0 || err == PBK_NO_OBJECT);
            free(map.changed);
            free(map.hydrated);
            break;
        default:
            pbk_nodes_drop_indexes(l->s.nodes);
            pbk_node_opened(node);
            pbk_node_released(node);
            break;
        }
        pbk_node_put(other);
        pbk_node_put(node);
    }
    pbk_ctx_free(ctx);
    return NULL;
}

static uint32_t objects_crc;

static int add_object(const char *path, const struct stat *st, int flag, struct FTW *ftw)
{
    (void)ftw;
    if (flag != FTW_F)
        return 0;
    uint8_t *bytes = malloc((size_t)st->st_size + 1);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    CHECK(bytes != NULL && fd >= 0);
    CHECK(pbk_pread_full(fd, bytes, (size_t)st->st_size, 0) == st->st_size);
    /* In whatever order they come. */
    objects_crc ^= pbk_crc32c(pbk_crc32c(0, path, strlen(path)), bytes, (size_t)st->st_size);
    close(fd);
    free(bytes);
    return 0;
}

static uint32_t crc_of_layer(unsigned number)
{
    char path[8192];
    snprintf(path, sizeof(path), "%s/layer%u", directory, number);
    objects_crc = 0;
    CHECK(nftw(path, add_object, 8, FTW_PHYS) == 0);
    return objects_crc;
}

/* The page map that a node exports is the one that its sealed journal has. */
static void check_map(struct layers *l, uint64_t object, const struct pbk_page_map *map)
{
    static const uint8_t no_session[16];
    struct pbk_journal_scan scan;
    bool is_found = false;
    bool is_changed = false;
    for (size_t i = 0; i < map->n_words; i++)
        is_changed = is_changed || map->changed[i] != 0;
    CHECK(pbk_journal_scan(l->journal_fds[l->n - 1], no_session, NULL, NULL, &scan) == 0);
    CHECK(scan.end == l->sealed_ends[l->n - 1]);
    for (size_t i = 0; i < scan.n_maps; i++) {
        if (scan.maps[i].object != object)
            continue;
        is_found = true;
        for (uint32_t b = 0; b < map->limit; b++) {
            const struct pbk_bits *changed = &scan.maps[i].changed;
            bool is_recorded = b / 64 < changed->n_words && (changed->words[b / 64] >> (b % 64) & 1);
            CHECK(is_recorded == (map->changed[b / 64] >> (b % 64) & 1));
        }
    }
    CHECK(is_found || !is_changed);
    pbk_journal_scan_free(&scan);
}

static void seal_once(struct layers *l)
{
    struct pbk_seal *seal;
    struct pbk_page_map map;
    pthread_mutex_lock(&l->attach_lock);
    make_layer(l, l->n + 1);
    pbk_nodes_gate_close(l->s.nodes);
    CHECK(pbk_nodes_sync(l->s.nodes) == 0);
    struct pbk_node *node = get(&l->s, 1);
    uint64_t object = node->object != NULL ? node->object->id : 0;
    int has_map = pbk_node_page_map(node, &map);
    CHECK(has_map == 0 || has_map == PBK_NO_OBJECT);
    /* One that comes to nothing leaves all as it was. */
    CHECK(pbk_nodes_prepare_seal(l->s.nodes, "sealed", &seal) == 0);
    pbk_nodes_cancel_seal(seal);
    CHECK(pbk_nodes_prepare_seal(l->s.nodes, "sealed", &seal) == 0);
    l->sealed_ends[l->n] = pbk_journal_end(l->journals[l->n]);
    CHECK(pbk_journal_synced(l->journals[l->n]) == l->sealed_ends[l->n]);
    l->sealed_crcs[l->n] = crc_of_layer(l->n);
    pbk_nodes_seal(seal, l->journals[l->n + 1], l->objects[l->n + 1]);
    l->n++;
    CHECK(!pbk_node_has_object(node));
    CHECK(pbk_nodes_gate_open(l->s.nodes) == 0);
    if (has_map == 0)
        check_map(l, object, &map);
    free(map.changed);
    free(map.hydrated);
    pbk_node_put(node);
    pthread_mutex_unlock(&l->attach_lock);
}

static void test_seal(void)
{
    static struct layers l;
    uint8_t *stream;
    size_t n;
    pthread_t threads[6];
    void *(*const mains[6])(void *) = {write_lower_under_seals, write_upper_under_seals, read_all,
                                       disturb_seals,           disturb_seals,           read_all};
    make_store(&stream, &n);
    close(make_file("data", stream, n));
    free(stream);
    int root = open_directory();
    pthread_mutex_init(&l.attach_lock, NULL);
    l.next_object = 1;
    make_layer(&l, 0);
    l.s.nodes = pbk_nodes_new(l.journals[0], l.objects[0], -1, 2 * 8 * N_BLOCKS + 300);
    CHECK(l.s.nodes != NULL);
    struct pbk_ctx *ctx = pbk_ctx_new(1 << 20);
    for (uint64_t ino = 1; ino <= N_NODES; ino++) {
        struct pbk_source_spec spec = {.kind = PBK_SOURCE_PAGES,
                                       .dir_fd = root,
                                       .path = "data",
                                       .label = "FULL",
                                       .size = n,
                                       .limit = PBK_NO_LIMIT,
                                       .compress = PBK_COMPRESS_ZLIB};
        CHECK(pbk_nodes_add(l.s.nodes, ino, (uint64_t)N_BLOCKS * PBK_BLCKSZ, &spec, 1) == 0);
    }
    atomic_store(&l.s.n_running, 2);
    for (unsigned i = 0; i < 6; i++)
        CHECK(pthread_create(&threads[i], NULL, mains[i], &l) == 0);
    for (unsigned i = 0; i < N_SEALS; i++) {
        /* Until somebody has written since the last one. */
        while (l.n > 0 && pbk_journal_end(l.journals[l.n]) == PBK_JOURNAL_HEADER)
            sched_yield();
        seal_once(&l);
    }
    atomic_store(&l.is_done, true);
    for (unsigned i = 0; i < 6; i++)
        pthread_join(threads[i], NULL);

    struct pbk_node *node = get(&l.s, 1);
    struct iovec iov[2];
    int n_iov;
    for (uint32_t b = 0; b < N_BLOCKS; b++) {
        CHECK(pbk_node_read(node, ctx, (uint64_t)b * PBK_BLCKSZ, PBK_BLCKSZ, iov, 2, &n_iov) == PBK_BLCKSZ);
        CHECK(check_half(iov[1].iov_base) == l.s.lower[b]);
        CHECK(check_half((uint8_t *)iov[1].iov_base + HALF) == l.s.upper[b]);
    }
    pbk_node_put(node);
    /* Nothing of what was sealed has changed since. */
    for (unsigned i = 0; i < N_SEALS; i++) {
        CHECK(pbk_journal_end(l.journals[i]) == l.sealed_ends[i]);
        CHECK(crc_of_layer(i) == l.sealed_crcs[i]);
    }
    pbk_ctx_free(ctx);
    pbk_nodes_free(l.s.nodes);
    for (unsigned i = 0; i <= N_SEALS; i++) {
        pbk_journal_free(l.journals[i]);
        close(l.journal_fds[i]);
        close(l.objects[i]);
    }
    pthread_mutex_destroy(&l.attach_lock);
    close(root);
}

int main(void)
{
    const char *tmp = getenv("TMPDIR");
    snprintf(directory, sizeof(directory), "%s/pbkfs-core.XXXXXX", tmp != NULL ? tmp : "/tmp");
    CHECK(mkdtemp(directory) != NULL);
    atexit(remove_directory);
    /* So few that nodes have to give their descriptors back. */
    struct rlimit few = {.rlim_cur = 64, .rlim_max = 64};
    CHECK(setrlimit(RLIMIT_NOFILE, &few) == 0);
    test_crc32c();
    test_pglz_damage();
    test_page_stream_damage();
    test_journal_damage();
    test_threads();
    test_whole_against_half();
    test_hydration();
    test_seal();
    return 0;
}

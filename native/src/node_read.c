/*
 * Reading: where each block of a request is, and getting it with few system calls.
 *
 * Blocks of plain files (objects, raw sources) are read straight into the page slots. Records of one stored file that lie
 * close together are read at once, headers and all: raw pages are answered from there, by pointing behind the header, and
 * compressed ones are inflated into their slots. Holes point to zeros.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "node_private.h"
#include "pbk/bytes.h"
#include "pbk/checksum.h"
#include "pbk/io.h"
#include "pbk/pagestream.h"
#include "pbk/pglz.h"

/* Skipping a record that newer layers replaced costs less than another system call; larger gaps cost more. */
#define MAX_GAP (2u * (PBK_BLCKSZ + PBK_RECORD_HEADER))
#define GAP_BUDGET (512u * 1024u)
/* A payload and what pads it to 8. */
#define MAX_RECORD (PBK_RECORD_HEADER + PBK_BLCKSZ)

static const uint8_t zeros[8 * PBK_BLCKSZ];

/* ---- the per-thread context ---- */

struct pbk_ctx *pbk_ctx_new(size_t max_io)
{
    struct pbk_ctx *ctx;
    if (max_io < PBK_BLCKSZ)
        max_io = PBK_BLCKSZ;
    if (max_io > 64u << 20)
        max_io = 64u << 20;
    ctx = calloc(1, sizeof(*ctx));
    if (ctx == NULL)
        return NULL;
    ctx->max_io = max_io;
    ctx->max_blocks = max_io / PBK_BLCKSZ + 2;
    ctx->records_size = ctx->max_blocks * MAX_RECORD + GAP_BUDGET;
    ctx->inflater = pbk_inflater_new();
    ctx->pages = malloc(ctx->max_blocks * PBK_BLCKSZ);
    ctx->records = malloc(ctx->records_size);
    ctx->places = calloc(ctx->max_blocks, sizeof(*ctx->places));
    ctx->members = calloc(ctx->max_blocks, sizeof(*ctx->members));
    ctx->merge[0] = malloc(PBK_BLCKSZ);
    ctx->merge[1] = malloc(PBK_BLCKSZ);
    if (ctx->inflater == NULL || ctx->pages == NULL || ctx->records == NULL || ctx->places == NULL ||
        ctx->members == NULL || ctx->merge[0] == NULL || ctx->merge[1] == NULL) {
        pbk_ctx_free(ctx);
        return NULL;
    }
    return ctx;
}

void pbk_ctx_free(struct pbk_ctx *ctx)
{
    if (ctx == NULL)
        return;
    pbk_inflater_free(ctx->inflater);
    free(ctx->pages);
    free(ctx->records);
    free(ctx->places);
    free(ctx->members);
    free(ctx->merge[0]);
    free(ctx->merge[1]);
    free(ctx);
}

size_t pbk_ctx_max_io(const struct pbk_ctx *ctx)
{
    return ctx->max_io;
}

/* ---- failures ---- */

/* The page is unreadable, whatever the errno was: the caller gets EIO, the log says why. */
static int fail(struct pbk_node *node, const struct pbk_source *source, uint64_t block, const char *reason, int err)
{
    pbk_log_failure(&node->nodes->log, source->name, block, source->label, reason, err == -EIO ? 0 : -err);
    return -EIO;
}

/* ---- where blocks are ---- */

/* The loaded index with a reference, or NULL. */
static struct pbk_index *take_index(struct pbk_node *node)
{
    struct pbk_index_set *set = &node->nodes->indexes;
    struct pbk_index *index = pbk_index_get(set, &node->index);
    if (index != NULL && pbk_index_is_stale(index)) {
        pbk_index_put(set, index);
        pbk_index_drop(set, &node->index);
        index = NULL;
    }
    return index;
}

static int get_index(struct pbk_node *node, struct pbk_ctx *ctx, struct pbk_index **index)
{
    struct pbk_nodes *nodes = node->nodes;
    *index = take_index(node);
    if (*index != NULL)
        return 0;
    pthread_mutex_lock(&node->load_lock);
    int err = 0;
    *index = take_index(node);
    if (*index == NULL) {
        /* Whatever was sealed above them: blocks behind this end are never theirs. */
        uint64_t n_blocks = blocks_of(node->sources_size);
        if (n_blocks > PBK_MAX_SEGMENT_BLOCKS)
            n_blocks = PBK_MAX_SEGMENT_BLOCKS;
        err = pbk_index_build(node->sources, node->first_pages, node->n_sources, (uint32_t)n_blocks, &nodes->files,
                              ctx->inflater, &nodes->log, index);
        if (err == 0) {
            count(&nodes->counters.index_loads, 1);
            pbk_index_publish(&nodes->indexes, &node->index, *index);
        } else {
            fail(node, &node->sources[node->first_pages], PBK_LOG_NO_BLOCK, "page index can't be loaded", err);
        }
    }
    pthread_mutex_unlock(&node->load_lock);
    return err ? -EIO : 0;
}

/* The place of one block below the object; *index is loaded when it is first needed. */
static int find_below(struct pbk_node *node, struct pbk_ctx *ctx, struct pbk_index **index, uint64_t block,
                      struct place *place)
{
    *place = (struct place){.kind = PLACE_HOLE};
    if (block >= blocks_of(node->below_size))
        return 0;
    for (unsigned i = node->n_sealed; i-- > 0;) {
        if (pbk_source_object_has(node->sealed[i], block)) {
            place->kind = PLACE_DIRECT;
            place->source = -2 - (int)i;
            return 0;
        }
    }
    if (block >= blocks_of(node->sources_size))
        return 0;
    for (unsigned i = 0; i < node->first_pages; i++) {
        const struct pbk_source *source = &node->sources[i];
        if (source->kind == PBK_SOURCE_RAW || pbk_source_object_has(source, block)) {
            place->kind = PLACE_DIRECT;
            place->source = (int)i;
            return 0;
        }
    }
    if (node->first_pages == node->n_sources || block >= PBK_MAX_SEGMENT_BLOCKS)
        return 0;
    if (*index == NULL) {
        int err = get_index(node, ctx, index);
        if (err)
            return err;
    }
    unsigned source;
    uint64_t entry = pbk_index_lookup(*index, (uint32_t)block, &source);
    if (entry == 0)
        return 0;
    place->source = (int)source;
    if (entry == PBK_INDEX_DAMAGED) {
        place->kind = PLACE_DAMAGED;
    } else {
        place->kind = PLACE_STORED;
        place->pos = pbk_index_pos(entry);
        place->length = pbk_index_length(entry);
    }
    return 0;
}

/* ---- getting them ---- */

/* What of a request is wanted: blocks first … first + n, bytes [off, end). */
struct request {
    uint64_t first;
    size_t n;
    uint64_t off;
    uint64_t end;
};

static int read_object(struct pbk_node *node, uint8_t *to, uint64_t start, uint64_t end)
{
    struct pbk_nodes *nodes = node->nodes;
    int fd = pbk_file_acquire(&nodes->files, &node->object->file);
    ssize_t r = fd;
    if (fd >= 0) {
        r = pbk_pread_full(fd, to, (size_t)(end - start), start);
        pbk_file_release(&nodes->files, &node->object->file);
        count(&nodes->counters.object_reads, 1);
    }
    if (r < 0) {
        pbk_log_failure(&nodes->log, node->object->file.path, start / PBK_BLCKSZ, "diff", "object can't be read",
                        -(int)r);
        return -EIO;
    }
    /* The object may be shorter where another writer is about to extend it. */
    memset(to + r, 0, (size_t)(end - start) - (size_t)r);
    return 0;
}

static int read_plain(struct pbk_node *node, int number, uint8_t *to, uint64_t start, uint64_t end)
{
    struct pbk_nodes *nodes = node->nodes;
    struct pbk_source *source = node_source(node, number);
    uint64_t have = node->below_size;
    if (number >= 0 && node->sources_size < have)
        have = node->sources_size;
    if (source->kind == PBK_SOURCE_RAW && source->size < have)
        have = source->size;
    size_t want = start >= have ? 0 : (size_t)((end < have ? end : have) - start);
    ssize_t r = 0;
    if (want > 0) {
        int fd = pbk_file_acquire(&nodes->files, &source->file);
        r = fd;
        if (fd >= 0) {
            r = pbk_pread_full(fd, to, want, start);
            pbk_file_release(&nodes->files, &source->file);
            count(&nodes->counters.base_reads, 1);
        }
        if (r < 0)
            return fail(node, source, start / PBK_BLCKSZ, "file can't be read", (int)r);
        if ((size_t)r < want && source->kind == PBK_SOURCE_RAW)
            return fail(node, source, (start + (uint64_t)r) / PBK_BLCKSZ, "file is shorter than listed", -EIO);
    }
    memset(to + r, 0, (size_t)(end - start) - (size_t)r);
    return 0;
}

/* Blocks i … j - 1 lie in the same plain file: the wanted part of them, into their slots. */
static int load_direct(struct pbk_node *node, struct pbk_ctx *ctx, const struct request *rq, size_t i, size_t j)
{
    uint64_t start = (rq->first + i) * PBK_BLCKSZ;
    uint64_t end = (rq->first + j) * PBK_BLCKSZ;
    if (start < rq->off)
        start = rq->off;
    if (end > rq->end)
        end = rq->end;
    uint8_t *to = ctx->pages + (start - rq->first * PBK_BLCKSZ);
    int source = ctx->places[i].source;
    int err = source == PLACE_OBJECT ? read_object(node, to, start, end) : read_plain(node, source, to, start, end);
    if (err)
        return err;
    for (size_t k = i; k < j; k++)
        ctx->places[k].page = ctx->pages + k * PBK_BLCKSZ;
    return 0;
}

/* Source: PostgreSQL src/include/storage/bufpage.h, PageHeaderData; src/backend/storage/page/bufpage.c, PageIsVerified. */
static bool is_sane_page(const uint8_t *page)
{
    unsigned flags = page[10] | (unsigned)page[11] << 8;
    unsigned lower = page[12] | (unsigned)page[13] << 8;
    unsigned upper = page[14] | (unsigned)page[15] << 8;
    unsigned special = page[16] | (unsigned)page[17] << 8;
    unsigned size = (page[18] | (unsigned)page[19] << 8) & 0xFF00;
    return size == PBK_BLCKSZ && (flags & ~7u) == 0 && lower >= 24 && lower <= upper && upper <= special &&
           special <= PBK_BLCKSZ && special % 8 == 0;
}

/* One record that has been read: the page is in it as it is, or is inflated into its slot. */
static int unpack(struct pbk_node *node, struct pbk_ctx *ctx, const struct request *rq, size_t i, const uint8_t *record)
{
    struct place *place = &ctx->places[i];
    const struct pbk_source *source = node_source(node, place->source);
    uint64_t block = rq->first + i;
    const uint8_t *payload = record + PBK_RECORD_HEADER;
    uint8_t *slot = ctx->pages + i * PBK_BLCKSZ;

    if (pbk_get_u32(record) != block || pbk_get_u32(record + 4) != place->length)
        return fail(node, source, block, "record header disagrees with the index", -EIO);
    bool is_raw = place->length == PBK_BLCKSZ;
    if (is_raw && source->is_zlib_8192 && source->compress == PBK_COMPRESS_ZLIB && payload[0] == 0x78 &&
        !is_sane_page(payload))
        is_raw = false;
    if (is_raw) {
        place->page = payload;
        count(&node->nodes->counters.pages_raw, 1);
        return 0;
    }
    int err = -EIO;
    if (source->compress == PBK_COMPRESS_ZLIB)
        err = pbk_inflate(ctx->inflater, payload, place->length, slot, PBK_BLCKSZ);
    else if (source->compress == PBK_COMPRESS_PGLZ)
        err = pbk_pglz_decompress(payload, place->length, slot, PBK_BLCKSZ);
    if (err)
        return fail(node, source, block,
                    source->compress == PBK_COMPRESS_NONE ? "page has an impossible length" : "page does not inflate",
                    -EIO);
    place->page = slot;
    count(&node->nodes->counters.pages_inflated, 1);
    return 0;
}

/* Block i and what of the request lies shortly behind it in the same stored file. */
static int load_stored(struct pbk_node *node, struct pbk_ctx *ctx, const struct request *rq, size_t i)
{
    struct pbk_nodes *nodes = node->nodes;
    struct pbk_source *source = node_source(node, ctx->places[i].source);
    uint64_t start = ctx->places[i].pos;
    uint64_t end = start;
    size_t n_members = 0;

    for (size_t j = i; j < rq->n; j++) {
        const struct place *place = &ctx->places[j];
        if (place->kind != PLACE_STORED || place->source != ctx->places[i].source || place->page != NULL)
            continue;
        if (place->pos < end)
            break;
        uint64_t gap = place->pos - end;
        if (gap > MAX_GAP || gap > ctx->gap_budget)
            break;
        ctx->gap_budget -= (size_t)gap;
        end = (uint64_t)place->pos + PBK_RECORD_HEADER + place->length;
        ctx->members[n_members++] = (uint16_t)j;
    }
    uint8_t *records = ctx->records + ctx->records_used;
    size_t want = (size_t)(end - start);
    ctx->records_used += want;

    int fd = pbk_file_acquire(&nodes->files, &source->file);
    if (fd < 0)
        return fail(node, source, rq->first + i, "stored file can't be opened", fd);
    ssize_t r = pbk_pread_full(fd, records, want, start);
    pbk_file_release(&nodes->files, &source->file);
    count(&nodes->counters.base_reads, 1);
    if (r < 0)
        return fail(node, source, rq->first + i, "stored file can't be read", (int)r);
    for (size_t k = 0; k < n_members; k++) {
        size_t j = ctx->members[k];
        size_t at = (size_t)(ctx->places[j].pos - start);
        if (at + PBK_RECORD_HEADER + ctx->places[j].length > (size_t)r)
            return fail(node, source, rq->first + j, "stored file is shorter than listed", -EIO);
        int err = unpack(node, ctx, rq, j, records + at);
        if (err)
            return err;
    }
    return 0;
}

/* What load does about blocks that the object has. */
enum with_object {
    OBJECT_READ,   /* takes them from there */
    OBJECT_IGNORE, /* takes their version below */
    OBJECT_SKIP,   /* leaves them out: page stays NULL */
};

static int load(struct pbk_node *node, struct pbk_ctx *ctx, const struct request *rq, enum with_object with)
{
    struct pbk_index *index = NULL;
    struct pbk_object *object = with == OBJECT_IGNORE ? NULL : node->object;
    int err = 0;

    ctx->records_used = 0;
    ctx->gap_budget = GAP_BUDGET;
    for (size_t i = 0; err == 0 && i < rq->n; i++) {
        if (object != NULL && object_has(object, rq->first + i))
            ctx->places[i] =
                (struct place){.kind = with == OBJECT_SKIP ? PLACE_SKIPPED : PLACE_DIRECT, .source = PLACE_OBJECT};
        else
            err = find_below(node, ctx, &index, rq->first + i, &ctx->places[i]);
    }
    if (index != NULL)
        pbk_index_put(&node->nodes->indexes, index);
    for (size_t i = 0; err == 0 && i < rq->n; i++) {
        struct place *place = &ctx->places[i];
        if (place->page != NULL)
            continue;
        switch (place->kind) {
        case PLACE_HOLE:
            place->page = zeros;
            count(&node->nodes->counters.pages_hole, 1);
            break;
        case PLACE_DAMAGED:
            err = fail(node, node_source(node, place->source), rq->first + i,
                       "layer is damaged where it may store the page", -EIO);
            break;
        case PLACE_DIRECT: {
            size_t j = i + 1;
            while (j < rq->n && ctx->places[j].kind == PLACE_DIRECT && ctx->places[j].source == place->source)
                j++;
            err = load_direct(node, ctx, rq, i, j);
            break;
        }
        case PLACE_STORED:
            err = load_stored(node, ctx, rq, i);
            break;
        case PLACE_SKIPPED:
            break;
        }
    }
    return err;
}

/* ---- looking at them ---- */

int pbk_node_verify(struct pbk_node *node, uint32_t first_blkno, bool has_checksums)
{
    size_t n_words = (size_t)(blocks_of(node->sources_size) / 64 + 1);
    if (node->verified != NULL)
        return -EEXIST;
    node->verified = calloc(n_words, sizeof(*node->verified));
    if (node->verified == NULL)
        return -ENOMEM;
    node->first_blkno = first_blkno;
    node->has_checksums = has_checksums;
    atomic_store_explicit(&node->verifies, true, memory_order_release);
    return 0;
}

/* Whole blocks were loaded. Those of the base are looked at once. */
static int verify_pages(struct pbk_node *node, struct pbk_ctx *ctx, const struct request *rq)
{
    for (size_t i = 0; i < rq->n; i++) {
        const struct place *place = &ctx->places[i];
        uint64_t block = rq->first + i;
        /* Of a part of a page at the end, PostgreSQL reads nothing. */
        if ((block + 1) * PBK_BLCKSZ > node->sources_size || bit_is_set(node->verified, block))
            continue;
        if (place->kind != PLACE_STORED &&
            (place->kind != PLACE_DIRECT || place->source < 0 || node->sources[place->source].kind != PBK_SOURCE_RAW))
            continue;
        const char *complaint =
            pbk_page_complaint(place->page, node->first_blkno + (uint32_t)block, node->has_checksums);
        if (complaint != NULL) {
            count(&node->nodes->counters.verify_errors, 1);
            return fail(node, node_source(node, place->source), block, complaint, -EIO);
        }
        set_bit(node->verified, block);
        count(&node->nodes->counters.pages_verified, 1);
    }
    return 0;
}

/* Bytes of a last, partial block behind the end of the sources are zeros, whatever its page has there. */
static void blank_behind(struct pbk_node *node, struct pbk_ctx *ctx, const struct request *rq)
{
    uint64_t block = node->sources_size / PBK_BLCKSZ;
    size_t rest = (size_t)(node->sources_size % PBK_BLCKSZ);
    if (rest == 0 || block < rq->first || block >= rq->first + rq->n || rq->end <= node->sources_size)
        return;
    size_t i = (size_t)(block - rq->first);
    if (ctx->places[i].kind != PLACE_STORED)
        return;
    uint8_t *slot = ctx->pages + i * PBK_BLCKSZ;
    if (ctx->places[i].page != slot)
        memcpy(slot, ctx->places[i].page, rest);
    memset(slot + rest, 0, PBK_BLCKSZ - rest);
    ctx->places[i].page = slot;
}

int node_read_below(struct pbk_node *node, struct pbk_ctx *ctx, uint64_t block, uint8_t page[PBK_BLCKSZ])
{
    struct request rq = {.first = block, .n = 1, .off = block * PBK_BLCKSZ, .end = (block + 1) * PBK_BLCKSZ};
    memset(page, 0, PBK_BLCKSZ);
    if (rq.off >= node->below_size)
        return 0;
    int err = load(node, ctx, &rq, OBJECT_IGNORE);
    if (err) {
        count(&node->nodes->counters.read_errors, 1);
        return err;
    }
    blank_behind(node, ctx, &rq);
    uint64_t have = node->below_size - rq.off;
    size_t n = have < PBK_BLCKSZ ? (size_t)have : PBK_BLCKSZ;
    memcpy(page, ctx->places[0].page, n);
    count(&node->nodes->counters.bytes_copied, n);
    return 0;
}

/* ---- the answer ---- */

/* The byte ranges of the answer; neighbours in memory become one. -1 if there are more than max_iov. */
static int fill_iov(struct pbk_ctx *ctx, const struct request *rq, struct iovec *iov, int max_iov)
{
    int n = 1;
    for (size_t i = 0; i < rq->n; i++) {
        uint64_t start = (rq->first + i) * PBK_BLCKSZ;
        uint64_t end = start + PBK_BLCKSZ;
        uint64_t from = start < rq->off ? rq->off : start;
        if (end > rq->end)
            end = rq->end;
        const uint8_t *p = ctx->places[i].page + (from - start);
        size_t length = (size_t)(end - from);
        struct iovec *last = &iov[n - 1];
        if (n > 1 && ctx->places[i].page == zeros && ctx->places[i - 1].page == zeros &&
            last->iov_len + length <= sizeof(zeros)) {
            last->iov_base = (void *)(uintptr_t)zeros;
            last->iov_len += length;
        } else if (n > 1 && (const uint8_t *)last->iov_base + last->iov_len == p && p != zeros) {
            last->iov_len += length;
        } else {
            if (n == max_iov)
                return -1;
            iov[n].iov_base = (void *)(uintptr_t)p;
            iov[n].iov_len = length;
            n++;
        }
    }
    return n;
}

/* Everything into the slots, which lie side by side. */
static int gather(struct pbk_ctx *ctx, const struct request *rq, struct iovec *iov)
{
    for (size_t i = 0; i < rq->n; i++) {
        uint8_t *slot = ctx->pages + i * PBK_BLCKSZ;
        if (ctx->places[i].page != slot)
            memcpy(slot, ctx->places[i].page, PBK_BLCKSZ);
    }
    iov[1].iov_base = ctx->pages + (rq->off - rq->first * PBK_BLCKSZ);
    iov[1].iov_len = (size_t)(rq->end - rq->off);
    return 2;
}

int node_load_missing(struct pbk_node *node, struct pbk_ctx *ctx, uint64_t first, size_t n)
{
    struct request rq = {.first = first, .n = n, .off = first * PBK_BLCKSZ, .end = (first + n) * PBK_BLCKSZ};
    int err = load(node, ctx, &rq, OBJECT_SKIP);
    if (err) {
        count(&node->nodes->counters.read_errors, 1);
        return err;
    }
    blank_behind(node, ctx, &rq);
    return 0;
}

ssize_t pbk_node_read(struct pbk_node *node, struct pbk_ctx *ctx, uint64_t off, size_t len, struct iovec *iov,
                      int max_iov, int *n_iov)
{
    struct pbk_nodes *nodes = node->nodes;
    int err = 0;

    *n_iov = 1;
    if (max_iov < 2)
        return -EINVAL;
    if (len > ctx->max_io)
        len = ctx->max_io;
    count(&nodes->counters.reads, 1);
    count(&node->n_reads, 1);
    pthread_rwlock_rdlock(&node->lock);
    uint64_t size = atomic_load_explicit(&node->size, memory_order_acquire);
    if (off >= size || len == 0) {
        pthread_rwlock_unlock(&node->lock);
        return 0;
    }
    if (len > size - off)
        len = (size_t)(size - off);
    struct request rq = {.first = off / PBK_BLCKSZ, .off = off, .end = off + len};
    rq.n = (size_t)((rq.end - 1) / PBK_BLCKSZ - rq.first + 1);
    if (atomic_load_explicit(&node->verifies, memory_order_acquire)) {
        struct request whole = {.first = rq.first, .n = rq.n, .off = rq.first * PBK_BLCKSZ};
        whole.end = whole.off + rq.n * PBK_BLCKSZ;
        err = load(node, ctx, &whole, OBJECT_READ);
        if (err == 0)
            err = verify_pages(node, ctx, &whole);
    } else {
        err = load(node, ctx, &rq, OBJECT_READ);
    }
    if (err == 0)
        blank_behind(node, ctx, &rq);
    pthread_rwlock_unlock(&node->lock);
    if (err) {
        count(&nodes->counters.read_errors, 1);
        return err;
    }
    int n = fill_iov(ctx, &rq, iov, max_iov);
    if (n < 0)
        n = gather(ctx, &rq, iov);
    *n_iov = n;
    count(&nodes->counters.bytes_read, len);
    return (ssize_t)len;
}

int pbk_node_copy_to(struct pbk_node *node, struct pbk_ctx *ctx, int fd)
{
    struct iovec iov[2];
    int n_iov;
    uint64_t off = 0;
    for (;;) {
        ssize_t r = pbk_node_read(node, ctx, off, ctx->max_io, iov, 2, &n_iov);
        if (r < 0)
            return (int)r;
        if (r == 0)
            break;
        int err = pbk_pwrite_full(fd, iov[1].iov_base, iov[1].iov_len, off);
        if (err)
            return err;
        off += (uint64_t)r;
        count(&node->nodes->counters.bytes_copied, (uint64_t)r);
    }
    return pbk_ftruncate(fd, off);
}

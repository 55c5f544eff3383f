/*
 * Hydration: bringing up, unchanged, what a mapped object has not got yet, until nothing is read from below any more.
 *
 * What is below never changes, so it is read without a page stripe; only putting it into the object happens under one, and
 * only for blocks that are still not there: a block that was written meanwhile has its bit, one that was cut off lies at or
 * above the limit, and both stay as they are. The node lock is held shared all the time, so nothing is cut off in between.
 *
 * Nothing is recorded here. The bit of a hydrated block means the same bytes as before, so a crash may forget it; its HYDRATED
 * record is appended after the next fdatasync of the object.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>

#include "node_private.h"
#include "pbk/io.h"
#include "pbk/step.h"

static bool is_missing(const struct pbk_object *object, uint64_t block)
{
    return !object_has(object, block);
}

/* The first block from first on that the object has not got, or its limit. */
static uint64_t find_missing(const struct pbk_object *object, uint64_t first)
{
    uint64_t block = first;
    while (block < object->limit) {
        uint64_t word = atomic_load_explicit(&object->present[block / 64], memory_order_acquire) >> (block % 64);
        if (~word << (block % 64) >> (block % 64) != 0) {
            block += (uint64_t)__builtin_ctzll(~word);
            break;
        }
        block = (block / 64 + 1) * 64;
    }
    return block < object->limit ? block : object->limit;
}

/* Blocks first + i … first + j - 1 into the object, as far as they lie inside of the file, and their bits. Stripes locked. */
static int put_run(struct pbk_node *node, struct pbk_ctx *ctx, int fd, uint64_t first, size_t i, size_t j)
{
    struct iovec iov[PBK_CHUNK_BLOCKS];
    uint64_t start = (first + i) * PBK_BLCKSZ;
    uint64_t size = atomic_load(&node->size);
    int n = 0;
    for (size_t k = i; k < j; k++) {
        uint64_t at = (first + k) * PBK_BLCKSZ;
        if (at >= size)
            break;
        iov[n].iov_base = (void *)(uintptr_t)ctx->places[k].page;
        iov[n].iov_len = size - at < PBK_BLCKSZ ? (size_t)(size - at) : PBK_BLCKSZ;
        n++;
    }
    if (n > 0) {
        pbk_step("object:hydrate");
        int err = pbk_pwritev_full(fd, iov, n, start);
        if (err)
            return err;
    }
    for (size_t k = i; k < j; k++)
        set_bit(node->object->present, first + k);
    return 0;
}

/* The loaded blocks first … first + n - 1 that are still missing. */
static int put_chunk(struct pbk_node *node, struct pbk_ctx *ctx, int fd, uint64_t first, size_t n, uint64_t *n_put)
{
    struct pbk_object *object = node->object;
    uint64_t mask = node_stripe_mask(node, first, first + n - 1);
    int err = 0;
    node_lock_stripes(node->nodes, mask);
    for (size_t i = 0; err == 0 && i < n;) {
        size_t j = i;
        while (j < n && ctx->places[j].page != NULL && is_missing(object, first + j))
            j++;
        if (j > i) {
            err = put_run(node, ctx, fd, first, i, j);
            if (err == 0)
                *n_put += j - i;
            i = j;
        } else {
            i++;
        }
    }
    node_unlock_stripes(node->nodes, mask);
    return err;
}

/* Bringing a block up is no change of the file: its time of modification stays, unless somebody did change the file. */
static void keep_mtime(struct pbk_node *node, int fd, const struct stat *before, uint64_t n_changes)
{
    struct timespec times[2] = {{.tv_nsec = UTIME_OMIT}, before->st_mtim};
    if (atomic_load(&node->n_changes) == n_changes)
        (void)futimens(fd, times); /* a wrong time is no reason to fail */
}

/* One chunk from block *at on. *at is moved behind it, or to the limit if nothing is missing. */
static int hydrate_chunk(struct pbk_node *node, struct pbk_ctx *ctx, uint64_t *at, uint64_t *n_put, bool *is_done)
{
    struct stat before;
    int fd;
    int err = node_enter(node, false, &fd);
    if (err)
        return err;
    struct pbk_object *object = node->object;
    uint64_t first = object->is_mapped && !atomic_load(&object->is_whole) ? find_missing(object, *at) : UINT64_MAX;
    *is_done = first == UINT64_MAX || first >= object->limit;
    if (!*is_done) {
        uint64_t n_changes = atomic_load(&node->n_changes);
        uint64_t stop = (first / PBK_CHUNK_BLOCKS + 1) * PBK_CHUNK_BLOCKS;
        if (stop > object->limit)
            stop = object->limit;
        size_t n = (size_t)(stop - first);
        uint64_t n_before = *n_put;
        err = fstat(fd, &before) == 0 ? 0 : -errno;
        if (err == 0)
            err = node_load_missing(node, ctx, first, n);
        if (err == 0)
            err = put_chunk(node, ctx, fd, first, n, n_put);
        if (*n_put > n_before) {
            keep_mtime(node, fd, &before, n_changes);
            /* Begin to write it out now, or the next fdatasync, perhaps a commit's, would have to. */
            (void)sync_file_range(fd, (off_t)(first * PBK_BLCKSZ), (off_t)(n * PBK_BLCKSZ), SYNC_FILE_RANGE_WRITE);
        }
        *at = stop;
        *is_done = err == 0 && stop == object->limit;
    }
    node_leave(node);
    return err;
}

ssize_t pbk_node_hydrate(struct pbk_node *node, struct pbk_ctx *ctx, uint64_t off, uint64_t len, uint64_t *next)
{
    uint64_t at = off / PBK_BLCKSZ;
    uint64_t n_put = 0;
    bool is_done = false;
    if (ctx->max_blocks < PBK_CHUNK_BLOCKS)
        return -EINVAL;
    int err = at > PBK_MAX_BLOCKS ? -EINVAL : 0;
    while (err == 0 && !is_done && n_put * PBK_BLCKSZ < len)
        err = hydrate_chunk(node, ctx, &at, &n_put, &is_done);
    count(&node->nodes->counters.blocks_hydrated, n_put);
    *next = is_done ? UINT64_MAX : at * PBK_BLCKSZ;
    return err ? err : (ssize_t)(n_put * PBK_BLCKSZ);
}

static bool is_all_durable(const struct pbk_object *object)
{
    for (uint32_t block = 0; block < object->limit; block += 64) {
        uint32_t n = object->limit - block < 64 ? object->limit - block : 64;
        uint64_t all = n == 64 ? UINT64_MAX : (UINT64_C(1) << n) - 1;
        if ((object->durable[block / 64] & all) != all)
            return false;
    }
    return true;
}

int pbk_node_hydrate_sync(struct pbk_node *node)
{
    struct pbk_nodes *nodes = node->nodes;
    bool is_whole = false;
    int err = PBK_NO_OBJECT;
    pthread_rwlock_rdlock(&node->lock);
    struct pbk_object *object = node->object;
    if (object != NULL) {
        pthread_mutex_lock(&object->sync_lock);
        is_whole = !object->is_mapped || atomic_load(&object->is_whole);
        err = is_whole ? 0 : node_sync_object(node, true);
        if (err == 0 && !is_whole && is_all_durable(object)) {
            struct pbk_journal *journal = object->store.journal;
            err = journal != NULL ? pbk_journal_append_whole(journal, object->id) : 0;
            if (err == 0) {
                is_whole = true;
                atomic_store_explicit(&object->is_whole, true, memory_order_release);
            }
        }
        pthread_mutex_unlock(&object->sync_lock);
    }
    if (is_whole) {
        /* Nobody needs these any more. */
        pbk_index_demote(&nodes->indexes, &node->index);
        for (unsigned i = 0; i < node->n_sources; i++)
            pbk_file_demote(&nodes->files, &node->sources[i].file);
        for (unsigned i = 0; i < node->n_sealed; i++)
            pbk_file_demote(&nodes->files, &node->sealed[i]->file);
    }
    pthread_rwlock_unlock(&node->lock);
    return err ? err : is_whole;
}

static uint32_t count_bits(const atomic_uint_fast64_t *words, uint32_t n_blocks)
{
    uint32_t n = 0;
    for (uint32_t block = 0; block < n_blocks; block += 64) {
        uint64_t word = atomic_load_explicit(&words[block / 64], memory_order_relaxed);
        if (n_blocks - block < 64)
            word &= (UINT64_C(1) << (n_blocks - block)) - 1;
        n += (uint32_t)__builtin_popcountll(word);
    }
    return n;
}

void pbk_node_count_blocks(struct pbk_node *node, struct pbk_block_counts *counts)
{
    *counts = (struct pbk_block_counts){0};
    pthread_rwlock_rdlock(&node->lock);
    const struct pbk_object *object = node->object;
    if (object != NULL) {
        counts->is_whole = !object->is_mapped || atomic_load(&object->is_whole);
        if (object->is_mapped) {
            counts->n_blocks = object->limit;
            counts->n_present = counts->is_whole ? object->limit : count_bits(object->present, object->limit);
            counts->n_changed = count_bits(object->changed, object->limit);
        }
    }
    pthread_rwlock_unlock(&node->lock);
}

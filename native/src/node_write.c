/*
 * Changing the object of the diff: write, truncate, fallocate. A write arrives at any offset, often as half a page: the page
 * is then completed with its version below, once, and is the object's from then on.
 *
 * Order inside of a first write: pwrite, PAGES_LIVE, bits. Whatever fails on the way leaves them unset, and so the version
 * below in view. A block that was only hydrated is in the object already: PAGES_LIVE and the bit that says that it has changed
 * come first there, or the new bytes could be on disk and pass for those from below.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>

#include "node_private.h"
#include "pbk/io.h"
#include "pbk/step.h"

/* As PostgreSQL does by default (checkpoint_flush_after). */
#define WRITE_OUT_BYTES ((uint64_t)256 << 10)
#define CHUNK_BYTES ((uint64_t)PBK_CHUNK_BLOCKS * PBK_BLCKSZ)

static const uint8_t zero_page[PBK_BLCKSZ];

static uint64_t min_u64(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}

/* ---- size ---- */

static void raise_size(struct pbk_node *node, uint64_t size)
{
    uint_fast64_t old = atomic_load(&node->size);
    while (old < size &&
           !atomic_compare_exchange_weak_explicit(&node->size, &old, size, memory_order_release, memory_order_relaxed))
        ;
}

/* After a call that failed half-way: the size is what the object has. */
static void refresh_size(struct pbk_node *node, int fd)
{
    struct stat st;
    if (fstat(fd, &st) == 0)
        raise_size(node, (uint64_t)st.st_size);
}

/* ---- stripes ---- */

uint64_t node_stripe_mask(const struct pbk_node *node, uint64_t first, uint64_t last)
{
    uint64_t mask = 0;
    for (uint64_t s = first / PBK_STRIPE_BLOCKS; s <= last / PBK_STRIPE_BLOCKS; s++)
        mask |= UINT64_C(1) << ((node->ino * 29 + s) % PBK_N_STRIPES);
    return mask;
}

void node_lock_stripes(struct pbk_nodes *nodes, uint64_t mask)
{
    for (; mask != 0; mask &= mask - 1)
        pthread_mutex_lock(&nodes->stripes[__builtin_ctzll(mask)]);
}

void node_unlock_stripes(struct pbk_nodes *nodes, uint64_t mask)
{
    for (; mask != 0; mask &= mask - 1)
        pthread_mutex_unlock(&nodes->stripes[__builtin_ctzll(mask)]);
}

/* ---- mapped objects ---- */

/* Records those of the blocks first … last as changed that are in the object but were not changed (is_present), or that are
 * not yet in the object (else), and sets their bits. Stripes locked, at most a chunk. */
static int mark_blocks(struct pbk_node *node, uint64_t first, uint64_t last, bool is_present)
{
    struct pbk_object *object = node->object;
    struct pbk_range ranges[PBK_CHUNK_BLOCKS / 2 + 1];
    size_t n = 0;
    uint64_t n_new = 0;
    bool in_range = false;
    for (uint64_t b = first; b <= last; b++) {
        if (object_has_changed(object, b) || object_has(object, b) != is_present) {
            in_range = false;
            continue;
        }
        if (!in_range)
            ranges[n++] = (struct pbk_range){.first = (uint32_t)b};
        ranges[n - 1].count++;
        n_new++;
        in_range = true;
    }
    if (n == 0)
        return 0;
    if (object->store.journal != NULL) {
        int err = pbk_journal_append_pages(object->store.journal, PBK_RECORD_PAGES_LIVE, object->id, ranges, n);
        if (err)
            return err;
    }
    for (size_t i = 0; i < n; i++) {
        for (uint32_t k = 0; k < ranges[i].count; k++) {
            uint64_t block = (uint64_t)ranges[i].first + k;
            if (!is_present)
                set_bit(object->present, block);
            set_bit(object->changed, block);
        }
    }
    if (!is_present)
        count(&node->nodes->counters.blocks_new, n_new);
    return 0;
}

/* Before blocks first … last are written: those that were hydrated begin to differ from what is below. */
static int mark_hydrated(struct pbk_node *node, uint64_t first, uint64_t last)
{
    return mark_blocks(node, first, last, true);
}

/* After it: the new ones hold their content. */
static int add_blocks(struct pbk_node *node, uint64_t first, uint64_t last)
{
    return mark_blocks(node, first, last, false);
}

static bool all_changed(const struct pbk_object *object, uint64_t first, uint64_t last)
{
    for (uint64_t b = first; b <= last; b++)
        if (!object_has_changed(object, b))
            return false;
    return true;
}

/* A part of one page that is not in the object: the rest of what is visible of it comes from below. */
static int merge_page(struct pbk_node *node, struct pbk_ctx *ctx, uint64_t block, uint64_t off, const uint8_t *data,
                      size_t len, uint8_t *page, struct iovec *iov)
{
    uint64_t start = block * PBK_BLCKSZ;
    int err = node_read_below(node, ctx, block, page);
    if (err)
        return err;
    memcpy(page + (off - start), data, len);
    uint64_t size = atomic_load(&node->size);
    uint64_t end = size > off + len ? size : off + len;
    iov->iov_base = page;
    iov->iov_len = (size_t)min_u64(PBK_BLCKSZ, end - start);
    count(&node->nodes->counters.blocks_copied, 1);
    return 0;
}

/* Writes [off, off + len), at most a chunk, all of it below the limit, with the stripes locked. */
static int write_new(struct pbk_node *node, struct pbk_ctx *ctx, int fd, uint64_t off, const uint8_t *data, size_t len)
{
    uint64_t first = off / PBK_BLCKSZ;
    uint64_t last = (off + len - 1) / PBK_BLCKSZ;
    uint64_t end = off + len;
    uint64_t from = off;
    struct iovec iov[3];
    int n = 0;

    int err = mark_hydrated(node, first, last);
    if (err)
        return err;
    bool is_partial_head = off % PBK_BLCKSZ != 0 || (first == last && end % PBK_BLCKSZ != 0);
    if (is_partial_head && !object_has(node->object, first)) {
        size_t part = (size_t)(min_u64((first + 1) * PBK_BLCKSZ, end) - off);
        err = merge_page(node, ctx, first, off, data, part, ctx->merge[0], &iov[n++]);
        if (err)
            return err;
        from = first * PBK_BLCKSZ;
        data += part;
        len -= part;
    }
    size_t tail = (size_t)(end % PBK_BLCKSZ);
    bool merges_tail = len > 0 && first != last && tail != 0 && !object_has(node->object, last);
    if (merges_tail)
        len -= tail;
    if (len > 0)
        iov[n++] = (struct iovec){.iov_base = (void *)(uintptr_t)data, .iov_len = len};
    if (merges_tail) {
        err = merge_page(node, ctx, last, end - tail, data + len, tail, ctx->merge[1], &iov[n++]);
        if (err)
            return err;
    }
    pbk_step("object:write:first");
    err = pbk_pwritev_full(fd, iov, n, from);
    return err ? err : add_blocks(node, first, last);
}

static int write_mapped(struct pbk_node *node, struct pbk_ctx *ctx, int fd, uint64_t off, const uint8_t *data,
                        size_t len)
{
    struct pbk_object *object = node->object;
    uint64_t limit = (uint64_t)object->limit * PBK_BLCKSZ;

    while (len > 0) {
        pbk_step("object:write:mapped");
        if (off >= limit)
            return pbk_pwrite_full(fd, data, len, off);
        uint64_t end = min_u64(min_u64(off + len, (off / CHUNK_BYTES + 1) * CHUNK_BYTES), limit);
        size_t n = (size_t)(end - off);
        uint64_t first = off / PBK_BLCKSZ;
        uint64_t last = (end - 1) / PBK_BLCKSZ;
        int err;
        if (all_changed(object, first, last)) {
            err = pbk_pwrite_full(fd, data, n, off);
        } else {
            uint64_t mask = node_stripe_mask(node, first, last);
            node_lock_stripes(node->nodes, mask);
            err = write_new(node, ctx, fd, off, data, n);
            node_unlock_stripes(node->nodes, mask);
        }
        if (err)
            return err;
        off += n;
        data += n;
        len -= n;
    }
    return 0;
}

/* ---- the frame around every change ---- */

int node_enter(struct pbk_node *node, bool is_exclusive, int *fd)
{
    pbk_gate_enter(&node->nodes->gate);
    if (is_exclusive)
        pthread_rwlock_wrlock(&node->lock);
    else
        pthread_rwlock_rdlock(&node->lock);
    int err = PBK_NO_OBJECT;
    if (node->object != NULL) {
        *fd = pbk_file_acquire(&node->nodes->files, &node->object->file);
        if (*fd >= 0)
            return 0;
        err = *fd;
        pbk_log_failure(&node->nodes->log, node->object->file.path, PBK_LOG_NO_BLOCK, "diff", "object can't be opened",
                        -err);
        if (err != -EMFILE && err != -ENFILE && err != -ENOMEM && err != -EROFS)
            err = -EIO;
    }
    pthread_rwlock_unlock(&node->lock);
    pbk_gate_leave(&node->nodes->gate);
    return err;
}

void node_leave(struct pbk_node *node)
{
    /* Set after the change and before the descriptor is given back: see node_sync_object and enforce_bound. */
    atomic_store(&node->object->file.is_dirty, true);
    pbk_file_release(&node->nodes->files, &node->object->file);
    pthread_rwlock_unlock(&node->lock);
    pbk_gate_leave(&node->nodes->gate);
}

/* Whether a failure is an answer that a caller has to expect, and not one of the disk. */
static bool is_plain_refusal(int err)
{
    return err == -ENOSPC || err == -EDQUOT || err == -EFBIG || err == -EINVAL || err == -EOPNOTSUPP || err == -ENOSYS;
}

static int end_change(struct pbk_node *node, int fd, uint64_t block, int err)
{
    if (err)
        refresh_size(node, fd);
    if (err && !is_plain_refusal(err))
        pbk_log_failure(&node->nodes->log, node->object->file.path, block, "diff", "object can't be changed", -err);
    count(&node->n_changes, 1);
    node_leave(node);
    count(err ? &node->nodes->counters.write_errors : &node->nodes->counters.writes, 1);
    return err;
}

/*
 * What arrives here the kernel has already held back, or was asked to write (fsync, or sync_file_range of a checkpoint): begin
 * to write it out. Else the file system below would allocate it all in the fsync of the object, and its journal would make
 * each commit of the WAL wait for all of that: 150 to 280 ms in a checkpoint of pgbench, instead of 45 to 90.
 */
static void begin_write_out(struct pbk_object *object, int fd, size_t len)
{
    if (atomic_fetch_add(&object->n_held_back, len) + len < WRITE_OUT_BYTES)
        return;
    atomic_store(&object->n_held_back, 0);
    (void)sync_file_range(fd, 0, 0, SYNC_FILE_RANGE_WRITE);
}

static int check_end(uint64_t off, uint64_t len, uint64_t *end)
{
    return __builtin_add_overflow(off, len, end) || *end > INT64_MAX ? -EFBIG : 0;
}

ssize_t pbk_node_write(struct pbk_node *node, struct pbk_ctx *ctx, uint64_t off, const void *data, size_t len)
{
    uint64_t end;
    int fd;
    int err = check_end(off, len, &end);
    if (err)
        return err;
    err = node_enter(node, false, &fd);
    if (err)
        return err;
    if (len > 0) {
        if (end > atomic_load(&node->size))
            err = node_settle(node);
        if (err == 0)
            pbk_step("object:write");
        if (err == 0)
            err = node->object->is_mapped ? write_mapped(node, ctx, fd, off, data, len)
                                          : pbk_pwrite_full(fd, data, len, off);
        if (err == 0)
            raise_size(node, end);
        if (err == 0)
            begin_write_out(node->object, fd, len);
    }
    err = end_change(node, fd, off / PBK_BLCKSZ, err);
    if (err)
        return err;
    count(&node->nodes->counters.bytes_written, len);
    return (ssize_t)len;
}

/* ---- truncate ---- */

/* The part of a block that a cut leaves over has to be in the object: below, the block still has its other part. */
static int keep_cut_block(struct pbk_node *node, struct pbk_ctx *ctx, int fd, uint64_t size)
{
    uint64_t block = size / PBK_BLCKSZ;
    struct iovec iov;
    if (size % PBK_BLCKSZ == 0)
        return 0;
    if (object_has(node->object, block))
        return mark_hydrated(node, block, block);
    /* Whole as it is seen now, as the file is cut only afterwards. */
    int err = merge_page(node, ctx, block, block * PBK_BLCKSZ, zero_page, 0, ctx->merge[0], &iov);
    pbk_step("object:truncate:merge");
    if (err == 0)
        err = pbk_pwritev_full(fd, &iov, 1, block * PBK_BLCKSZ);
    if (err == 0)
        err = add_blocks(node, block, block);
    return err;
}

static int shrink_mapped(struct pbk_node *node, struct pbk_ctx *ctx, int fd, uint64_t size)
{
    struct pbk_object *object = node->object;

    int err = keep_cut_block(node, ctx, fd, size);
    pbk_step("object:truncate");
    if (err == 0)
        err = pbk_ftruncate(fd, size);
    pbk_step("object:truncated");
    if (err)
        return err;
    atomic_store(&node->size, size);
    if (blocks_of(size) < object->limit) {
        object->limit = (uint32_t)blocks_of(size);
        return node_record_truncate(node);
    }
    /* A cut inside of the last block: the block has to be the object's own for good, or its other part could come back. */
    return size % PBK_BLCKSZ != 0 && blocks_of(size) == object->limit ? node_record_truncate(node) : 0;
}

int node_truncate_locked(struct pbk_node *node, struct pbk_ctx *ctx, uint64_t size)
{
    struct pbk_object *object = node->object;
    uint64_t old = atomic_load(&node->size);
    int fd = pbk_file_acquire(&node->nodes->files, &object->file);
    int err = 0;
    if (fd < 0)
        return fd;
    if (size < old && object->is_mapped) {
        atomic_store(&object->file.is_dirty, true);
        err = shrink_mapped(node, ctx, fd, size);
    } else {
        if (size > old)
            err = node_settle(node);
        pbk_step("object:resize");
        if (err == 0)
            err = pbk_ftruncate(fd, size);
        if (err == 0)
            atomic_store(&node->size, size);
    }
    atomic_store(&object->file.is_dirty, true);
    pbk_file_release(&node->nodes->files, &object->file);
    return err;
}

int pbk_node_truncate(struct pbk_node *node, struct pbk_ctx *ctx, uint64_t size)
{
    int fd;
    if (size > INT64_MAX)
        return -EFBIG;
    int err = node_enter(node, true, &fd);
    if (err)
        return err;
    return end_change(node, fd, size / PBK_BLCKSZ, node_truncate_locked(node, ctx, size));
}

/* ---- fallocate ---- */

/* Marks blocks first … stop - 1, chunk by chunk. */
static int mark_range(struct pbk_node *node, uint64_t first, uint64_t stop, bool is_present)
{
    int err = 0;
    while (err == 0 && first < stop) {
        uint64_t next = min_u64((first / PBK_CHUNK_BLOCKS + 1) * PBK_CHUNK_BLOCKS, stop);
        err = mark_blocks(node, first, next - 1, is_present);
        first = next;
    }
    return err;
}

/* Whole blocks [start, end) become holes of the object, and the object's. */
static int punch_blocks(struct pbk_node *node, int fd, uint64_t start, uint64_t end)
{
    uint64_t stop = min_u64(end / PBK_BLCKSZ, node->object->limit);
    int err = mark_range(node, start / PBK_BLCKSZ, stop, true);
    pbk_step("object:punch");
    if (err == 0)
        err = pbk_fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, start, end - start);
    return err ? err : mark_range(node, start / PBK_BLCKSZ, stop, false);
}

/* With the exclusive node lock: nobody else sets bits, so stripes are only taken where the write path takes them. */
static int zero_mapped(struct pbk_node *node, struct pbk_ctx *ctx, int fd, uint64_t off, uint64_t end)
{
    uint64_t size = atomic_load(&node->size);
    int err = 0;
    end = min_u64(end, size);
    if (off >= end)
        return 0;
    uint64_t first = (off + PBK_BLCKSZ - 1) / PBK_BLCKSZ * PBK_BLCKSZ;
    /* A last block whose visible part is all zeros counts as whole. */
    uint64_t last = (end == size ? blocks_of(end) : end / PBK_BLCKSZ) * PBK_BLCKSZ;
    if (first > last)
        return write_mapped(node, ctx, fd, off, zero_page, (size_t)(end - off));
    if (first < last)
        err = punch_blocks(node, fd, first, last);
    if (err == 0 && off < first)
        err = write_mapped(node, ctx, fd, off, zero_page, (size_t)(min_u64(first, end) - off));
    if (err == 0 && last < end)
        err = write_mapped(node, ctx, fd, last, zero_page, (size_t)(end - last));
    return err;
}

/* Whoever asks before it takes space can still be refused: the reserve is for what the kernel took without asking. */
static int spare_reserve(struct pbk_node *node, int fd, uint64_t len)
{
    uint64_t reserve = atomic_load_explicit(&node->nodes->reserve_bytes, memory_order_relaxed);
    struct statvfs found;
    if (reserve == 0 || len == 0)
        return 0;
    if (fstatvfs(fd, &found) != 0)
        return -errno;
    uint64_t available = (uint64_t)found.f_bavail * found.f_frsize;
    if (found.f_blocks == 0)
        return 0; /* a file system that does not say */
    return available < reserve || available - reserve < len ? -ENOSPC : 0;
}

static int allocate(struct pbk_node *node, int fd, int mode, uint64_t off, uint64_t len)
{
    uint64_t size = atomic_load(&node->size);
    bool grows = !(mode & FALLOC_FL_KEEP_SIZE) && off + len > size;
    /* What lies inside of the file may be allocated already. */
    uint64_t behind = off > size ? off : size;
    int err = off + len > behind ? spare_reserve(node, fd, off + len - behind) : 0;
    if (err == 0 && grows)
        err = node_settle(node);
    pbk_step("object:allocate");
    if (err == 0)
        err = pbk_fallocate(fd, mode, off, len);
    if (err == 0 && grows)
        raise_size(node, off + len);
    return err;
}

int pbk_node_fallocate(struct pbk_node *node, struct pbk_ctx *ctx, int mode, uint64_t off, uint64_t len)
{
    uint64_t end;
    int fd;
    int err = check_end(off, len, &end);
    if (err)
        return err;
    if (len == 0)
        return -EINVAL;
    int what = mode & ~FALLOC_FL_KEEP_SIZE;
    if ((what != 0 && what != FALLOC_FL_PUNCH_HOLE && what != FALLOC_FL_ZERO_RANGE) || mode == FALLOC_FL_PUNCH_HOLE)
        return -EOPNOTSUPP;
    err = node_enter(node, what != 0, &fd);
    if (err)
        return err;
    if (what == 0 || !node->object->is_mapped) {
        err = allocate(node, fd, mode, off, len);
    } else {
        err = zero_mapped(node, ctx, fd, off, end);
        uint64_t size = atomic_load(&node->size);
        if (err == 0 && what == FALLOC_FL_ZERO_RANGE && end > size) {
            uint64_t start = off > size ? off : size;
            err = allocate(node, fd, mode & FALLOC_FL_KEEP_SIZE, start, end - start);
        }
    }
    return end_change(node, fd, off / PBK_BLCKSZ, err);
}

/* ---- attributes ---- */

static int stat_object(struct pbk_node *node, struct stat *st, bool *is_mapped)
{
    struct pbk_nodes *nodes = node->nodes;
    int err = PBK_NO_OBJECT;
    pthread_rwlock_rdlock(&node->lock);
    if (node->object != NULL) {
        *is_mapped = node->object->is_mapped;
        int fd = pbk_file_acquire(&nodes->files, &node->object->file);
        err = fd;
        if (fd >= 0) {
            err = fstat(fd, st) == 0 ? 0 : -errno;
            pbk_file_release(&nodes->files, &node->object->file);
        }
    }
    pthread_rwlock_unlock(&node->lock);
    return err;
}

int pbk_node_stat(struct pbk_node *node, struct stat *st)
{
    bool is_mapped;
    return stat_object(node, st, &is_mapped);
}

void pbk_node_set_links(struct pbk_node *node, unsigned n_links)
{
    atomic_store_explicit(&node->n_links, n_links, memory_order_relaxed);
}

int pbk_node_describe(struct pbk_node *node, struct stat *st)
{
    bool is_mapped;
    int err = stat_object(node, st, &is_mapped);
    if (err)
        return err;
    st->st_nlink = atomic_load_explicit(&node->n_links, memory_order_relaxed);
    /* A mapped object is full of holes that are no holes of the file. */
    if (is_mapped)
        st->st_blocks = (st->st_size + 511) / 512;
    return 0;
}

int pbk_node_utimens(struct pbk_node *node, const struct timespec ts[2])
{
    int fd;
    int err = node_enter(node, false, &fd);
    if (err)
        return err;
    return end_change(node, fd, PBK_LOG_NO_BLOCK, futimens(fd, ts) == 0 ? 0 : -errno);
}

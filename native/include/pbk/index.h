/*
 * The page index of one file: which stored page of which backup is block b. Merged once over all layers of a chain, newest
 * first, so that a read is one look-up however long the chain is. 8 bytes a block.
 *
 * Immutable once built. Kept in a set with a bound on its bytes; whoever reads holds a reference, so that an index can be
 * dropped at any time.
 */
#ifndef PBK_INDEX_H
#define PBK_INDEX_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <time.h>

#include "pbk/inflate.h"
#include "pbk/log.h"
#include "pbk/source.h"

/* Blocks [first, end) are unknown, as the layer that may store them could not be read to its end. */
struct pbk_index_damage {
    uint32_t first;
    uint32_t end;
    unsigned source;
};

struct pbk_index {
    /* who points to it; guarded by the set's lock, as the links and the count of references */
    struct pbk_index **owner;
    struct pbk_index *newer;
    struct pbk_index *older;
    unsigned n_refs;
    size_t bytes;
    uint32_t n_entries;
    uint64_t *entries; /* position: 32 bits, length: 14, spare: 2, source: 16. 0 is a hole, as no length is 0 */
    time_t stale_at_s; /* 0: never. Of CLOCK_MONOTONIC */
    unsigned n_damages;
    struct pbk_index_damage *damages;
};

static inline uint32_t pbk_index_pos(uint64_t entry)
{
    return (uint32_t)entry;
}

static inline uint32_t pbk_index_length(uint64_t entry)
{
    return (uint32_t)(entry >> 32) & 0x3FFF;
}

static inline unsigned pbk_index_source(uint64_t entry)
{
    return (unsigned)(entry >> 48);
}

/*
 * Builds the index of sources[first_source …], all of kind PAGES, for the blocks below n_blocks. A layer that is damaged is
 * logged, and the blocks it might have stored are marked: what newer layers store stays readable. *index or -errno.
 *
 * A layer that can't be read is treated the same, but the index is stale a moment later: then it is to be dropped.
 */
int pbk_index_build(struct pbk_source *sources, unsigned first_source, unsigned n_sources, uint32_t n_blocks,
                    struct pbk_file_set *files, struct pbk_inflater *inflater, struct pbk_log *log,
                    struct pbk_index **index);

bool pbk_index_is_stale(const struct pbk_index *);

/* What is stored for a block: its entry, 0 for a hole, or PBK_INDEX_DAMAGED with *source set. */
#define PBK_INDEX_DAMAGED UINT64_MAX
uint64_t pbk_index_lookup(const struct pbk_index *, uint32_t block, unsigned *source);

struct pbk_index_set {
    pthread_mutex_t lock; /* guards what follows, and in each index what it says there */
    struct pbk_index *newest;
    struct pbk_index *oldest;
    size_t bytes;
    size_t max_bytes;
};

int pbk_index_set_init(struct pbk_index_set *, size_t max_bytes);
void pbk_index_set_destroy(struct pbk_index_set *);

/* The index that *owner points to, with a reference, or NULL. */
struct pbk_index *pbk_index_get(struct pbk_index_set *, struct pbk_index **owner);
/* Publishes a new index at *owner, which has to be NULL, with one reference for the caller; drops old ones over the bound. */
void pbk_index_publish(struct pbk_index_set *, struct pbk_index **owner, struct pbk_index *);
void pbk_index_put(struct pbk_index_set *, struct pbk_index *);
void pbk_index_demote(struct pbk_index_set *, struct pbk_index **owner);
/* Drops the index at *owner / all of them; readers finish with theirs. Returns the bytes. */
size_t pbk_index_drop(struct pbk_index_set *, struct pbk_index **owner);
size_t pbk_index_drop_all(struct pbk_index_set *);
size_t pbk_index_bytes(struct pbk_index_set *);

#endif

/* What the files node*.c share; nobody else includes it. */
#ifndef PBK_NODE_PRIVATE_H
#define PBK_NODE_PRIVATE_H

#include <pthread.h>
#include <stdatomic.h>

#include "pbk/gate.h"
#include "pbk/index.h"
#include "pbk/inflate.h"
#include "pbk/log.h"
#include "pbk/node.h"
#include "pbk/nodes.h"

/*
 * A page whose version below has to be merged in is written under the lock of its stripe, and so is a whole page that was
 * not there before: else a merge that read the version below could overwrite it. A stripe is 16 blocks of one file. A chunk
 * of a write covers 9 stripes at most, so it never meets itself on the ring of 64; locked in ascending order.
 */
#define PBK_N_STRIPES 64u
#define PBK_STRIPE_BLOCKS 16u
#define PBK_CHUNK_BLOCKS 128u

#define PBK_COUNTER_FIELD(name) atomic_uint_fast64_t name;
#define PBK_GAUGE_FIELD(name)

struct pbk_counters {
    PBK_NODES_COUNTERS(PBK_COUNTER_FIELD, PBK_GAUGE_FIELD)
};

/* Where new objects lie, and the journal that tells of them. */
struct pbk_store {
    struct pbk_journal *journal; /* NULL: nothing is recorded */
    int objects_fd;
};

struct pbk_nodes {
    pthread_mutex_t store_lock; /* a leaf */
    struct pbk_store store;     /* store_lock; of the layer that is written to now */
    struct pbk_log log;
    struct pbk_file_set files;
    struct pbk_index_set indexes;
    struct pbk_gate gate;
    struct pbk_names names;
    struct pbk_directories directories;
    struct pbk_counters counters;
    atomic_uint_fast64_t reserve_bytes; /* free space that only what is in the kernel's cache may take */
    pthread_mutex_t stripes[PBK_N_STRIPES];
    pthread_rwlock_t table_lock; /* guards what follows */
    struct pbk_node **buckets;
    size_t n_buckets; /* a power of two */
    size_t n_nodes;
};

/* The object of the diff. */
struct pbk_object {
    uint64_t id;
    struct pbk_store store; /* constant: its own, also when the nodes have gone on to the next */
    bool is_mapped;
    struct pbk_file file;
    uint32_t limit;                   /* node lock */
    size_t n_words;                   /* of the bitmaps: blocks below the limit at attach */
    atomic_uint_fast64_t *present;    /* the block is in the object; from 0 to 1 under the page stripe */
    atomic_uint_fast64_t *changed;    /* and was written; never before present, from 0 to 1 under the page stripe */
    atomic_bool is_whole;             /* all are present and durable, and the journal says so; never falls */
    uint64_t *durable;                /* sync_lock: a record says that the block is in the object */
    uint64_t *recorded;               /* sync_lock: a record says that it was changed */
    atomic_uint_fast64_t n_held_back; /* bytes written since the last write-out was begun; about */
    pthread_mutex_t sync_lock; /* one at a time makes the object durable; after the node lock, before the journal */
    bool is_fresh;             /* sync_lock */
    uint32_t recorded_limit;   /* sync_lock: the limit that a replay of the journal would find */
    uint64_t settled_end;      /* sync_lock: journal position behind what a growth has to wait for */
    bool is_unrecorded;        /* sync_lock: a truncate failed before all that it has to record was appended */
    atomic_bool is_unsettled;  /* what a truncate recorded is missing or not durable: no growth before it is */
};

struct pbk_node {
    atomic_uint n_refs;
    struct pbk_nodes *nodes;
    uint64_t ino;
    struct pbk_node *next; /* table_lock */
    bool is_published;     /* table_lock */
    atomic_uint n_handles;
    atomic_uint n_links;
    atomic_uint_fast64_t n_reads;   /* how much the file is in use */
    atomic_uint_fast64_t n_changes; /* the same; counted at the end of a change */

    /* Reads, writes and syncs hold it shared, truncate, punch, attach, seal and restack exclusively. */
    pthread_rwlock_t lock;
    atomic_uint_fast64_t size;  /* grows under the shared lock, shrinks under the exclusive one */
    struct pbk_object *object;  /* node lock */
    uint64_t below_size;        /* node lock: size of the version below the object */
    unsigned n_sealed;          /* node lock */
    struct pbk_source **sealed; /* node lock: what was the object once, oldest first; they lie above the sources */

    /* node lock */
    uint64_t sources_size; /* size of the version that the sources are */
    unsigned n_sources;
    unsigned first_pages; /* sources from here on are of kind PAGES and are found through the index */
    struct pbk_source *sources;

    /* Which pages of the base were looked at before they were answered; see verify_pages. */
    atomic_bool verifies;
    bool has_checksums;             /* constant once verifies is set, as the next */
    uint32_t first_blkno;           /* of the file's first block in its fork */
    atomic_uint_fast64_t *verified; /* node lock: a bit a block of the sources */

    pthread_mutex_t load_lock; /* one thread at a time builds the index */
    struct pbk_index *index;   /* guarded by the index set's lock */
};

enum place_kind {
    PLACE_HOLE,
    PLACE_DIRECT, /* at the same offset of a plain file */
    PLACE_STORED, /* a record */
    PLACE_DAMAGED,
    PLACE_SKIPPED, /* not wanted */
};

#define PLACE_OBJECT (-1)

/* Where one block is. */
struct place {
    enum place_kind kind;
    int source; /* PLACE_OBJECT, or for node_source */
    uint32_t length;
    uint32_t pos;
    const uint8_t *page; /* its 8192 bytes, once loaded */
};

struct pbk_ctx {
    size_t max_io;
    size_t max_blocks;
    struct pbk_inflater *inflater;
    uint8_t *pages;   /* max_blocks pages: slot i belongs to the i-th block of the request */
    uint8_t *records; /* stored records, headers and all */
    size_t records_size;
    size_t records_used;
    size_t gap_budget;
    struct place *places; /* max_blocks */
    uint16_t *members;    /* max_blocks */
    uint8_t *merge[2];    /* a page each, for the two ends of a write */
};

/* The source with this number: from 0 on the node's sources, from -2 downwards what was sealed. */
static inline struct pbk_source *node_source(const struct pbk_node *node, int number)
{
    return number >= 0 ? &node->sources[number] : node->sealed[-2 - number];
}

static inline uint64_t blocks_of(uint64_t size)
{
    return size / PBK_BLCKSZ + (size % PBK_BLCKSZ != 0);
}

static inline void count(atomic_uint_fast64_t *counter, uint64_t n)
{
    atomic_fetch_add_explicit(counter, n, memory_order_relaxed);
}

static inline bool bit_is_set(const atomic_uint_fast64_t *words, uint64_t block)
{
    return atomic_load_explicit(&words[block / 64], memory_order_acquire) >> (block % 64) & 1;
}

static inline void set_bit(atomic_uint_fast64_t *words, uint64_t block)
{
    atomic_fetch_or_explicit(&words[block / 64], UINT64_C(1) << (block % 64), memory_order_release);
}

/* Whether a block is the object's; block < limit has its bit inside of the bitmap. */
static inline bool object_has(const struct pbk_object *object, uint64_t block)
{
    return !object->is_mapped || block >= object->limit ||
           atomic_load_explicit(&object->is_whole, memory_order_acquire) || bit_is_set(object->present, block);
}

/* Whether a block is the object's and is known to differ from what is below. */
static inline bool object_has_changed(const struct pbk_object *object, uint64_t block)
{
    return !object->is_mapped || block >= object->limit || bit_is_set(object->changed, block);
}

/* nodes.c */

/* What fails half-way leaves *n_sources of them, to be destroyed, and the array, to be freed. */
int node_make_sources(const struct pbk_source_spec *specs, unsigned n_specs, struct pbk_source **sources,
                      unsigned *n_sources, unsigned *first_pages);
struct pbk_store node_store(struct pbk_nodes *nodes);
void node_free_object(struct pbk_nodes *nodes, struct pbk_object *object);

/* node_read.c, node lock held in any mode. */

/* The version of a block below the object, zeros where it has nothing. */
int node_read_below(struct pbk_node *node, struct pbk_ctx *ctx, uint64_t block, uint8_t page[PBK_BLCKSZ]);
/* The versions below of those of n blocks (at most a chunk) that the object has not got, as ctx->places[i].page; NULL for the
 * others. */
int node_load_missing(struct pbk_node *node, struct pbk_ctx *ctx, uint64_t first, size_t n);

/* node_write.c */

/* Truncation to size by the holder of the exclusive node lock. */
int node_truncate_locked(struct pbk_node *node, struct pbk_ctx *ctx, uint64_t size);

/* Passes the gate, locks the node and gets its object's descriptor. PBK_NO_OBJECT or -errno: nothing is held. */
int node_enter(struct pbk_node *node, bool is_exclusive, int *fd);
void node_leave(struct pbk_node *node);

/* The stripes of blocks first … last, at most a chunk. */
uint64_t node_stripe_mask(const struct pbk_node *node, uint64_t first, uint64_t last);
void node_lock_stripes(struct pbk_nodes *nodes, uint64_t mask);
void node_unlock_stripes(struct pbk_nodes *nodes, uint64_t mask);

/* node_sync.c, node lock held in any mode. */

/* Data, size and page map of the object are durable, but for the journal's end. sync_lock held. */
int node_sync_object(struct pbk_node *node, bool datasync);

/* After a truncate: object and page records are written out, and the file can't grow before the journal up to here is
 * durable. */
int node_record_truncate(struct pbk_node *node);
/* Before the file grows: waits for that, or the blocks that come back could be old ones. */
int node_settle(struct pbk_node *node);

#endif

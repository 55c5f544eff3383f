/*
 * The table of nodes and what all nodes share: the other half of node.h, for the binding. Any thread, unless said otherwise.
 */
#ifndef PBK_NODES_H
#define PBK_NODES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "pbk/directories.h"
#include "pbk/journal.h"
#include "pbk/names.h"
#include "pbk/node.h"
#include "pbk/source.h"

/* Counters. G is a gauge: the value of now, which a reset leaves alone. */
#define PBK_NODES_COUNTERS(C, G)                                                                                       \
    G(nodes)           /* registered */                                                                                \
    G(open_files)      /* descriptors of sources and objects */                                                        \
    G(index_bytes)     /* loaded page indexes */                                                                       \
    C(index_loads)     /* page indexes built */                                                                        \
    C(reads)           /* calls of pbk_node_read */                                                                    \
    C(bytes_read)      /* bytes they answered */                                                                       \
    C(base_reads)      /* read system calls on sources */                                                              \
    C(object_reads)    /* read system calls on objects of the diff */                                                  \
    C(pages_raw)       /* stored pages answered as they are */                                                         \
    C(pages_inflated)  /* stored pages decompressed */                                                                 \
    C(pages_hole)      /* blocks that nothing stores */                                                                \
    C(pages_verified)  /* pages of the base that were found to be what PostgreSQL wrote */                             \
    C(verify_errors)   /* those that were not */                                                                       \
    C(read_errors)     /* reads that failed */                                                                         \
    C(writes)          /* calls that wrote, allocated, punched or truncated */                                         \
    C(bytes_written)   /* bytes of writes */                                                                           \
    C(write_errors)    /* changes that failed */                                                                       \
    C(blocks_new)      /* blocks that came into an object */                                                           \
    C(blocks_copied)   /* of these, blocks that were merged with their version below */                                \
    C(bytes_copied)    /* bytes read from below for that, and by copies of whole files */                              \
    C(blocks_hydrated) /* blocks brought up unchanged */                                                               \
    C(fsyncs)          /* calls of pbk_node_fsync */                                                                   \
    C(sync_errors)     /* objects that could not be made durable; they stay so until the next mount */                 \
    C(page_records)    /* ranges of blocks recorded as durable */                                                      \
    C(log_lines)       /* failure lines written */                                                                     \
    C(log_suppressed)  /* failure lines left out */

struct pbk_counter {
    const char *name;
    uint64_t value;
};

/* journal may be NULL: nothing is recorded. journal, objects_fd and log_fd (-1: none) are the caller's and outlive it. New
 * objects are found below objects_fd and are recorded in journal, until pbk_nodes_seal names others. */
struct pbk_nodes *pbk_nodes_new(struct pbk_journal *journal, int objects_fd, int log_fd, size_t index_bytes);
void pbk_nodes_clear(struct pbk_nodes *); /* removes all nodes */
void pbk_nodes_free(struct pbk_nodes *);  /* nobody holds a node any more */

/* Kept by whoever keeps the names; lives as long as the nodes. */
struct pbk_names *pbk_nodes_names(struct pbk_nodes *);
struct pbk_directories *pbk_nodes_directories(struct pbk_nodes *);

/*
 * Registers a file without an object; size is what a reader sees. -EEXIST, -EINVAL, -ENOMEM.
 *
 * The dispatcher does not see it before pbk_nodes_publish: until what belongs to the file, its object above all, has come to
 * it. Else whoever opens the file at the same time would be answered from below the object, and the kernel would keep that.
 */
int pbk_nodes_add(struct pbk_nodes *, uint64_t ino, uint64_t size, const struct pbk_source_spec *specs,
                  unsigned n_specs);
int pbk_nodes_publish(struct pbk_nodes *, uint64_t ino); /* -ENOENT. Once more changes nothing. */
int pbk_nodes_remove(struct pbk_nodes *, uint64_t ino);  /* -ENOENT */
/* As pbk_nodes_get, also of what is not published. */
struct pbk_node *pbk_nodes_get_any(struct pbk_nodes *, uint64_t ino);

/* What the journal says about an object that becomes the top of a node. The object and its size are durable by now, so one that
 * is shorter than the version below was truncated. All blocks in the bitmap are recorded as durable. */
struct pbk_attach {
    uint64_t object;
    const uint8_t *bitmap; /* blocks that were changed; little-endian 64-bit words, or NULL */
    size_t bitmap_bytes;
    const uint8_t *hydrated; /* blocks that are in the object too, as they are below; the same */
    size_t hydrated_bytes;
    uint32_t limit; /* PBK_NO_LIMIT: no record says; it starts as the number of blocks of the version below */
    bool is_mapped; /* false: nothing below counts, and nobody asks which blocks were changed */
    bool is_whole;  /* a mapped one that has all blocks */
    bool is_fresh;  /* its directory entry is not known to be durable */
};
int pbk_node_attach(struct pbk_node *, struct pbk_ctx *, const struct pbk_attach *);
bool pbk_node_has_object(struct pbk_node *);

/*
 * From now on reads of the file look at each page that comes from the base when it is read for the first time; one that
 * PostgreSQL would not take is EIO. first_blkno is that of the file's first block in its fork. Right after pbk_nodes_add;
 * -ENOMEM. Pages that are merged or hydrated are not looked at: one that is torn is mended by WAL before it is read.
 */
int pbk_node_verify(struct pbk_node *, uint32_t first_blkno, bool has_checksums);

/* How many names the file has; 1 until somebody says otherwise. */
void pbk_node_set_links(struct pbk_node *, unsigned n_links);

/*
 * Hydration: blocks of a mapped object that it has not got yet are copied up as they are below, from off on until about len
 * bytes were copied. *next is where to go on, UINT64_MAX behind the last block. Returns the bytes copied. Writes, truncates
 * and holes made meanwhile win. -errno: what was copied before stays.
 */
ssize_t pbk_node_hydrate(struct pbk_node *, struct pbk_ctx *, uint64_t off, uint64_t len, uint64_t *next);

/* Makes what was hydrated durable and records it; an object that has all blocks then becomes whole: it is read and written
 * without a map, which only goes on to tell which blocks were changed. 1 if it is whole, 0 if not, or -errno. */
int pbk_node_hydrate_sync(struct pbk_node *);

/* Blocks that could come from below: all of them, those in the object, those of these that were changed. All 0 without a
 * mapped object. */
struct pbk_block_counts {
    uint32_t n_blocks;
    uint32_t n_present;
    uint32_t n_changed;
    bool is_whole; /* nothing is read from below any more, mapped or not; false without an object */
};
void pbk_node_count_blocks(struct pbk_node *, struct pbk_block_counts *);

/* How much the registered files are in use: reads and changes since each was registered. Calls visit for those with any. */
void pbk_nodes_visit_heat(struct pbk_nodes *, void (*visit)(void *arg, uint64_t ino, uint64_t n_uses), void *arg);
/* Calls visit for those that the kernel has open. */
void pbk_nodes_visit_opened(struct pbk_nodes *, void (*visit)(void *arg, uint64_t ino, uint64_t n_handles), void *arg);

/*
 * Sealing: the objects of all nodes become what is below, and new ones go to another directory and another journal. Between
 * the three calls the gate is closed, and nobody attaches. pbk_nodes_seal can't fail: what it needs was made before. An fsync
 * may run all the time; one of an object that is sealed meanwhile ends with the object's own journal.
 */
struct pbk_seal;
/* 0, or -errno and nothing was made. label names the layer in log lines. */
int pbk_nodes_prepare_seal(struct pbk_nodes *, const char *label, struct pbk_seal **seal);
void pbk_nodes_cancel_seal(struct pbk_seal *);
/* All objects are synced. Journal and descriptor are the caller's, as those before them, which are still needed. */
void pbk_nodes_seal(struct pbk_seal *, struct pbk_journal *journal, int objects_fd);

/*
 * Restacking: nodes get other sources that hold the same. Prepared one by one (-ENOENT, -EINVAL also where size is not that
 * of what the node has below, -ENOMEM; *all is as before then); pbk_nodes_restack can't fail. Nobody seals or attaches between.
 */
struct pbk_restack;
int pbk_nodes_prepare_restack(struct pbk_nodes *, uint64_t ino, uint64_t size, const struct pbk_source_spec *specs,
                              unsigned n_specs, struct pbk_restack **all);
void pbk_nodes_cancel_restack(struct pbk_restack *all);
void pbk_nodes_restack(struct pbk_restack *all);

/* Makes all objects and the journal durable: the first -errno, after trying all. */
int pbk_nodes_sync(struct pbk_nodes *);

/* The -errno that a sync of the object has failed with since it was attached, else 0; syncs nothing. */
int pbk_node_sync_error(struct pbk_node *);

/* The page map of a mapped object; words are n_words each and the caller's to free. */
struct pbk_page_map {
    uint64_t *changed;
    uint64_t *hydrated; /* and not changed */
    size_t n_words;
    uint32_t limit;
    bool is_whole;
};
/* 0, -ENOMEM, or PBK_NO_OBJECT also for an object that is not mapped. */
int pbk_node_page_map(struct pbk_node *, struct pbk_page_map *);

/* Writes the whole visible content to fd, a regular file, from its start, and sets its size. */
int pbk_node_copy_to(struct pbk_node *, struct pbk_ctx *, int fd);

/* Gives back half of the descriptors of sources and objects; false if there was none to give. */
bool pbk_nodes_give_back_files(struct pbk_nodes *);

/* How much free space of the diff's file system fallocate has to leave: it is for what the kernel took without asking. */
void pbk_nodes_set_reserve(struct pbk_nodes *, uint64_t bytes);

size_t pbk_nodes_drop_indexes(struct pbk_nodes *);
void pbk_nodes_gate_close(struct pbk_nodes *);
int pbk_nodes_gate_open(struct pbk_nodes *);

/* Fills out (room for max) and returns the number of counters. */
size_t pbk_nodes_counters(struct pbk_nodes *, struct pbk_counter *out, size_t max);
void pbk_nodes_reset_counters(struct pbk_nodes *);

size_t pbk_ctx_max_io(const struct pbk_ctx *);

#endif

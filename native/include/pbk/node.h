/*
 * Nodes: the data of regular files, without the interpreter.
 *
 * A node is one regular file of the tree: a list of sources, newest first (perhaps an object of the diff, then objects of
 * sealed layers, then files of the base), and the page map that says which of them holds a block. Names and attributes of
 * files without an object are none of a node's business: they belong to overlay.Tree.
 *
 * Callers: the dispatcher's threads and the binding (without the GIL). Every function here may be called from any thread at
 * any time, as long as the caller holds a reference to the node (pbk_nodes_get) and no two threads share a pbk_ctx.
 *
 * Lock order: node table -> gate -> node -> page stripe -> object's sync lock -> journal. None is held when a function returns.
 */
#ifndef PBK_NODE_H
#define PBK_NODE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>

#define PBK_BLCKSZ 8192u
#define PBK_NO_LIMIT 0xFFFFFFFFu

/* Returned where there is nothing to write to yet: Python has to copy up first. No errno has this value. */
#define PBK_NO_OBJECT (-4096)

struct pbk_nodes;
struct pbk_node;
struct pbk_ctx;

/* Whether nothing has this name in this directory, for sure: see names.h. */
bool pbk_nodes_is_absent(struct pbk_nodes *, uint64_t directory, const void *name, size_t length);

/* Calls answer with the attributes of a directory; false if they are not known: see directories.h. */
bool pbk_nodes_answer_directory(struct pbk_nodes *, uint64_t ino, void (*answer)(void *arg, const struct stat *),
                                void *arg);

/* Buffers and decompressor of one thread. max_io is the longest read or write it will be used for; longer reads are cut
 * to it. NULL if there is no memory. */
struct pbk_ctx *pbk_ctx_new(size_t max_io);
void pbk_ctx_free(struct pbk_ctx *);

/* The node published for ino with one more reference, or NULL. It stays usable until pbk_node_put, even if it is removed
 * from the table meanwhile. */
struct pbk_node *pbk_nodes_get(struct pbk_nodes *, uint64_t ino);
void pbk_node_put(struct pbk_node *);
uint64_t pbk_node_ino(const struct pbk_node *);

/*
 * Fills iov[1..] (iov[0] is left for the caller's header) with what the file holds at off; the answer ends at the end of
 * the file. *n_iov is the number of entries in use, iov[0] included: writev(fd, iov, *n_iov). max_iov has to be at least 2;
 * with len / 8192 + 3 entries no byte is moved once more. The pointers are valid until the next call with the same ctx.
 * Returns the bytes or -errno (EIO: logged, and never a part of the data).
 */
ssize_t pbk_node_read(struct pbk_node *, struct pbk_ctx *, uint64_t off, size_t len, struct iovec *iov, int max_iov,
                      int *n_iov);

/* All of these return 0 (write: the bytes), -errno, or PBK_NO_OBJECT. Writes wait for the gate. */
ssize_t pbk_node_write(struct pbk_node *, struct pbk_ctx *, uint64_t off, const void *data, size_t len);
int pbk_node_fallocate(struct pbk_node *, struct pbk_ctx *, int mode, uint64_t off, uint64_t len);
int pbk_node_truncate(struct pbk_node *, struct pbk_ctx *, uint64_t size);
int pbk_node_stat(struct pbk_node *, struct stat *);     /* of the object */
int pbk_node_describe(struct pbk_node *, struct stat *); /* of the file, as the tree shows it */
int pbk_node_utimens(struct pbk_node *, const struct timespec ts[2]);

/* Returns when all that was written before is durable: object, page map, and the journal up to its newest record. Without
 * an object only the journal is synced. */
int pbk_node_fsync(struct pbk_node *, bool datasync);

/* Size as a reader sees it; with or without an object. */
uint64_t pbk_node_size(struct pbk_node *);

/* Open handles of the kernel. A node without handles gives its descriptors and its index back first. */
void pbk_node_opened(struct pbk_node *);
void pbk_node_released(struct pbk_node *);

#endif

/*
 * Files that are open only while they are used, and a bounded number of them for a while longer.
 *
 * A pbk_file knows where it lies and is opened at its first use. The set closes the least recently used descriptor that
 * nobody holds when it has more than its bound. Any thread; the set's lock is a leaf, and no system call
 * that can wait for a disk is made under it, but the open of a file whose mode does not let its owner open it.
 */
#ifndef PBK_FILE_H
#define PBK_FILE_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "pbk/log.h"

struct pbk_file {
    int dir_fd; /* the caller's, outlives the file */
    int flags;  /* O_RDONLY or O_RDWR */
    char *path; /* owned */
    /* What follows is guarded by the set's lock, but for the atomics. */
    int fd;          /* -1: not open */
    unsigned n_pins; /* uses; 0 and open: in the list */
    bool is_evicted; /* being synced, to be closed then */
    struct pbk_file *newer;
    struct pbk_file *older;
    atomic_bool is_dirty;  /* written to since the last fdatasync */
    atomic_int sync_error; /* first failed fdatasync, sticky: its pages are lost though the kernel calls them clean */
};

struct pbk_file_set {
    /* Where a failure of such a sync is told of. NULL: nowhere */
    struct pbk_log *log;
    atomic_uint_fast64_t *n_sync_errors;
    pthread_mutex_t lock; /* guards what follows */
    pthread_cond_t unpinned;
    struct pbk_file *newest;
    struct pbk_file *oldest;
    unsigned n_open;
    unsigned max_open;
};

int pbk_file_set_init(struct pbk_file_set *, unsigned max_open, struct pbk_log *, atomic_uint_fast64_t *n_sync_errors);
void pbk_file_set_destroy(struct pbk_file_set *); /* every file has been destroyed */
unsigned pbk_file_set_n_open(struct pbk_file_set *);

int pbk_file_init(struct pbk_file *, int dir_fd, const char *path, int flags);
void pbk_file_destroy(struct pbk_file_set *, struct pbk_file *); /* not in use */

/* A descriptor (>= 0) that stays open until pbk_file_release, or -errno. */
int pbk_file_acquire(struct pbk_file_set *, struct pbk_file *);
void pbk_file_release(struct pbk_file_set *, struct pbk_file *);

/*
 * Makes an acquired file durable, with fdatasync or fsync; 0 or -errno. A first failure is final: the kernel drops what it could
 * not write and says so once, and later calls would be believed.
 */
int pbk_file_sync(struct pbk_file_set *, struct pbk_file *, int fd, bool datasync);

/*
 * After an open that failed with err (-errno): whether to try again, because some of our descriptors were given back for it.
 * *n_tries is 0 before the first. Not while the caller holds a lock of the set's.
 */
bool pbk_file_set_relieve(struct pbk_file_set *, int err, unsigned *n_tries);

/* *to becomes what *from was, descriptor and all; *from is as after pbk_file_destroy. Nobody uses either. */
void pbk_file_move(struct pbk_file_set *, struct pbk_file *from, struct pbk_file *to);

/* Makes it the first to be closed. */
void pbk_file_demote(struct pbk_file_set *, struct pbk_file *);

#endif

/*
 * The dispatcher: owns the conversation with the kernel over one fuse descriptor.
 *
 * Its threads read requests, answer the hot ones from the nodes, and pass all others unchanged to pyfuse3, which believes
 * that its end of a SOCK_SEQPACKET socketpair is the fuse device. They never take the interpreter's lock.
 *
 *   readers (n_readers)   read the fuse descriptor, answer or forward; never wait for Python
 *   pool (n_fsync + 1)    FSYNC (at most n_fsync at once), and what waited for a copy-up or for space
 *   pump (1)              replies of pyfuse3 to the kernel, and forwarded requests that found the socketpair full
 *   notifier (1)          invalidations: the kernel may make them wait for a page that a reader has to write first
 *
 * Locks: pending, outbox, pool and notes each guard one list of the same name (see dispatcher_internal.h). They are leaves:
 * under them nothing else is locked, no node function is called and nothing is written to a descriptor.
 */
#ifndef PBK_DISPATCHER_H
#define PBK_DISPATCHER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "pbk/node.h"

struct pbk_dispatcher;

struct pbk_dispatcher_options {
    unsigned n_readers; /* 0: twice the cores, at least 4, at most 16 */
    unsigned n_fsync;   /* 0: 4 */
    int log_fd;         /* one text line per failure, never waits; -1: none. Borrowed. */
    int hold_s;         /* for how long a written-back page waits for space; -1: for ever, 0: not at all */

    bool is_supervised; /* another process is to take over when this one dies: see keep_present */
    /* To take over a connection from a dead process: the argument of INIT that the kernel sent to it; else 0 bytes. */
    const void *init;
    size_t init_length;
};

/* Makes the socketpair and the event descriptors, no thread. nodes and fuse_fd are borrowed and must outlive the
 * dispatcher. 0 or -errno. */
int pbk_dispatcher_new(struct pbk_nodes *nodes, int fuse_fd, const struct pbk_dispatcher_options *options,
                       struct pbk_dispatcher **made);

/* Starts the threads, with all signals blocked in them. 0, -EALREADY, or -errno with nothing left running. */
int pbk_dispatcher_start(struct pbk_dispatcher *);

/*
 * Ends and joins all threads; afterwards nothing of the dispatcher uses the nodes or the fuse descriptor. Requests under way
 * are finished, parked ones are dropped: the kernel fails them when the fuse descriptor is closed. Needs no answer from
 * pyfuse3, works whether or not the connection is gone, any number of times. Any thread but the dispatcher's.
 */
void pbk_dispatcher_stop(struct pbk_dispatcher *);

/* Stops, closes the descriptors and frees. NULL is allowed. */
void pbk_dispatcher_free(struct pbk_dispatcher *);

/* The end for pyfuse3, owned by the dispatcher: give it a dup. */
int pbk_dispatcher_socket_fd(const struct pbk_dispatcher *);
/* An eventfd, readable for good once the kernel has let go of the connection (unmounted or aborted). */
int pbk_dispatcher_event_fd(const struct pbk_dispatcher *);

/* Tell the kernel to drop what it cached; queued, never waits. length <= 0: to the end; offset < 0: attributes only.
 * 0, -ENOMEM, -ENAMETOOLONG, or -ENOTCONN when not running. Any thread. */
int pbk_dispatcher_invalidate(struct pbk_dispatcher *, uint64_t ino, int64_t offset, int64_t length);
int pbk_dispatcher_invalidate_entry(struct pbk_dispatcher *, uint64_t parent, const void *name, size_t length);

/* What the kernel said at INIT: copies up to room bytes and returns how many there are; 0 before it has said it. Any thread. */
size_t pbk_dispatcher_init_request(struct pbk_dispatcher *, void *to, size_t room);
/* What this program says to that: as the one before. Any thread. */
size_t pbk_dispatcher_init_answer(const void *request, size_t length, void *to, size_t room);

/*
 * Python knows a request by its token, which takes the place of the caller's process in the header: pyfuse3 passes on nothing
 * else that could hold it. This is what it stands for, of a request that waits for Python: the kernel's number for it, and the
 * process. Bit 63 of the number says that the kernel sends the request again, because whoever had it died; the others are the same
 * as then, and never come again. False for an unknown token. Any thread.
 */
bool pbk_dispatcher_request(struct pbk_dispatcher *, uint32_t token, uint64_t *unique, uint32_t *pid);

/* Whether the kernel knows an inode: 1, 0 or -errno. May wait for its pages to be written: not on the thread that serves names. */
int pbk_dispatcher_is_known(struct pbk_dispatcher *, uint64_t ino);

/* Calls visit once a counter with a name that lives as long as the call. Any thread. */
void pbk_dispatcher_counters(struct pbk_dispatcher *, void (*visit)(void *arg, const char *name, uint64_t value),
                             void *arg);
/* Sets the counters of events to zero; those of states (outstanding, …) stay. Any thread. */
void pbk_dispatcher_reset_counters(struct pbk_dispatcher *);

#endif

/*
 * Which names are not there: a LOOKUP of a missing name is answered without asking Python.
 *
 * PostgreSQL looks for names that do not exist all the time (the next segment, forks, a file it is about to create): of 64
 * requests that CREATE, TRUNCATE and DROP of one table sent to Python, 48 were such LOOKUPs.
 *
 * A multiset of 64-bit hashes of (directory, name), 8 to 24 bytes a name. Two names with one hash make a missing name look
 * as if it were there, never the other way round, so an answer "absent" is always right. Any thread.
 */
#ifndef PBK_NAMES_H
#define PBK_NAMES_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct pbk_names {
    pthread_rwlock_t lock; /* guards what follows */
    uint64_t *slots;       /* 0 is empty */
    size_t n_slots;        /* 0 or a power of two */
    size_t n_used;
    bool is_lost; /* a name could not be added for lack of memory: nothing is absent any more */
};

int pbk_names_init(struct pbk_names *); /* 0 or -ENOMEM */
void pbk_names_destroy(struct pbk_names *);

void pbk_names_add(struct pbk_names *, uint64_t directory, const void *name, size_t length);
void pbk_names_remove(struct pbk_names *, uint64_t directory, const void *name, size_t length);
/* All names of the directory have been added: whatever was not is absent. Undone by remove of the empty name. */
void pbk_names_complete(struct pbk_names *, uint64_t directory);

/* False also where nobody knows. */
bool pbk_names_is_absent(struct pbk_names *, uint64_t directory, const void *name, size_t length);

#endif

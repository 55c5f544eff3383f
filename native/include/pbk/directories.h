/*
 * Attributes of directories that were asked for or changed lately: a GETATTR of one is answered without Python.
 *
 * The kernel forgets a directory's attributes at every change of its names and asks again at the next path through it, so
 * every file that is made or removed costs one GETATTR. A small cache, filled by whoever owns the names. Any thread.
 */
#ifndef PBK_DIRECTORIES_H
#define PBK_DIRECTORIES_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/stat.h>

#define PBK_N_DIRECTORIES 64u

struct pbk_directories {
    pthread_mutex_t
        lock; /* guards slots; held while an answer is given, so that it can't be overtaken by a newer one */
    struct {
        uint64_t ino; /* 0: empty */
        struct stat st;
    } slots[PBK_N_DIRECTORIES];
};

int pbk_directories_init(struct pbk_directories *);
void pbk_directories_destroy(struct pbk_directories *);

void pbk_directories_set(struct pbk_directories *, uint64_t ino, const struct stat *);
void pbk_directories_drop(struct pbk_directories *, uint64_t ino);

/* Calls answer with the attributes; false if they are not known. answer must not wait for Python. */
bool pbk_directories_answer(struct pbk_directories *, uint64_t ino, void (*answer)(void *arg, const struct stat *),
                            void *arg);

#endif

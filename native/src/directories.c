/* One slot for each inode number modulo the number of slots: see directories.h. */
#define _GNU_SOURCE
#include "pbk/directories.h"

#include <string.h>

int pbk_directories_init(struct pbk_directories *directories)
{
    memset(directories, 0, sizeof *directories);
    return -pthread_mutex_init(&directories->lock, NULL);
}

void pbk_directories_destroy(struct pbk_directories *directories)
{
    pthread_mutex_destroy(&directories->lock);
}

void pbk_directories_set(struct pbk_directories *directories, uint64_t ino, const struct stat *st)
{
    pthread_mutex_lock(&directories->lock);
    directories->slots[ino % PBK_N_DIRECTORIES].ino = ino;
    directories->slots[ino % PBK_N_DIRECTORIES].st = *st;
    pthread_mutex_unlock(&directories->lock);
}

void pbk_directories_drop(struct pbk_directories *directories, uint64_t ino)
{
    pthread_mutex_lock(&directories->lock);
    if (directories->slots[ino % PBK_N_DIRECTORIES].ino == ino)
        directories->slots[ino % PBK_N_DIRECTORIES].ino = 0;
    pthread_mutex_unlock(&directories->lock);
}

bool pbk_directories_answer(struct pbk_directories *directories, uint64_t ino,
                            void (*answer)(void *arg, const struct stat *), void *arg)
{
    pthread_mutex_lock(&directories->lock);
    bool is_known = ino != 0 && directories->slots[ino % PBK_N_DIRECTORIES].ino == ino;
    if (is_known)
        answer(arg, &directories->slots[ino % PBK_N_DIRECTORIES].st);
    pthread_mutex_unlock(&directories->lock);
    return is_known;
}

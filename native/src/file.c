/* Bounded descriptors: see the header. */
#define _GNU_SOURCE
#include "pbk/file.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "pbk/io.h"

#define MAX_RELIEF 8u

int pbk_file_set_init(struct pbk_file_set *set, unsigned max_open, struct pbk_log *log,
                      atomic_uint_fast64_t *n_sync_errors)
{
    memset(set, 0, sizeof(*set));
    set->max_open = max_open;
    set->log = log;
    set->n_sync_errors = n_sync_errors;
    int err = pthread_mutex_init(&set->lock, NULL);
    if (err)
        return -err;
    err = pthread_cond_init(&set->unpinned, NULL);
    if (err)
        pthread_mutex_destroy(&set->lock);
    return -err;
}

void pbk_file_set_destroy(struct pbk_file_set *set)
{
    pthread_cond_destroy(&set->unpinned);
    pthread_mutex_destroy(&set->lock);
}

unsigned pbk_file_set_n_open(struct pbk_file_set *set)
{
    pthread_mutex_lock(&set->lock);
    unsigned n = set->n_open;
    pthread_mutex_unlock(&set->lock);
    return n;
}

static void list_remove(struct pbk_file_set *set, struct pbk_file *file)
{
    if (file->newer != NULL)
        file->newer->older = file->older;
    else if (set->newest == file)
        set->newest = file->older;
    if (file->older != NULL)
        file->older->newer = file->newer;
    else if (set->oldest == file)
        set->oldest = file->newer;
    file->newer = file->older = NULL;
}

static void list_add_newest(struct pbk_file_set *set, struct pbk_file *file)
{
    file->newer = NULL;
    file->older = set->newest;
    if (set->newest != NULL)
        set->newest->newer = file;
    else
        set->oldest = file;
    set->newest = file;
}

static void list_add_oldest(struct pbk_file_set *set, struct pbk_file *file)
{
    file->older = NULL;
    file->newer = set->oldest;
    if (set->oldest != NULL)
        set->oldest->older = file;
    else
        set->newest = file;
    set->oldest = file;
}

int pbk_file_init(struct pbk_file *file, int dir_fd, const char *path, int flags)
{
    memset(file, 0, sizeof(*file));
    file->dir_fd = dir_fd;
    file->flags = flags;
    file->fd = -1;
    file->path = strdup(path);
    return file->path != NULL ? 0 : -ENOMEM;
}

void pbk_file_destroy(struct pbk_file_set *set, struct pbk_file *file)
{
    pthread_mutex_lock(&set->lock);
    /* Its owner is done with it, but enforce_bound may be syncing it. */
    while (file->n_pins > 0)
        pthread_cond_wait(&set->unpinned, &set->lock);
    if (file->fd >= 0) {
        list_remove(set, file);
        set->n_open--;
    }
    pthread_mutex_unlock(&set->lock);
    if (file->fd >= 0)
        close(file->fd);
    free(file->path);
    file->fd = -1;
    file->path = NULL;
}

void pbk_file_move(struct pbk_file_set *set, struct pbk_file *from, struct pbk_file *to)
{
    pthread_mutex_lock(&set->lock);
    while (from->n_pins > 0) /* enforce_bound, as above */
        pthread_cond_wait(&set->unpinned, &set->lock);
    to->dir_fd = from->dir_fd;
    to->flags = from->flags;
    to->path = from->path;
    to->fd = from->fd;
    to->n_pins = 0;
    to->newer = to->older = NULL;
    atomic_store(&to->is_dirty, atomic_load(&from->is_dirty));
    atomic_store(&to->sync_error, atomic_load(&from->sync_error));
    if (from->fd >= 0) {
        list_remove(set, from);
        list_add_newest(set, to);
    }
    from->fd = -1;
    from->path = NULL;
    pthread_mutex_unlock(&set->lock);
}

/* An unlinked file can't be opened again: it keeps its descriptor. */
static bool is_unlinked(int fd)
{
    struct stat st;
    return fstat(fd, &st) != 0 || st.st_nlink == 0;
}

/* Takes the descriptor of the oldest file that nobody uses away from it, and pins the file. NULL if there is none. */
static struct pbk_file *take_oldest(struct pbk_file_set *set, int *fd)
{
    for (struct pbk_file *file = set->oldest; file != NULL; file = file->newer) {
        if (file->flags != O_RDONLY && is_unlinked(file->fd))
            continue;
        list_remove(set, file);
        *fd = file->fd;
        file->fd = -1;
        set->n_open--;
        return file;
    }
    return NULL;
}

static int sync_descriptor(struct pbk_file_set *set, struct pbk_file *file, int fd, bool datasync)
{
    int err = datasync ? pbk_fdatasync(fd) : pbk_fsync(fd);
    if (err) {
        int none = 0;
        atomic_compare_exchange_strong(&file->sync_error, &none, err);
        if (set->n_sync_errors != NULL)
            atomic_fetch_add_explicit(set->n_sync_errors, 1, memory_order_relaxed);
        if (set->log != NULL)
            pbk_log_failure(set->log, file->path, PBK_LOG_NO_BLOCK, "diff", "object can't be synced", -err);
    }
    return err;
}

int pbk_file_sync(struct pbk_file_set *set, struct pbk_file *file, int fd, bool datasync)
{
    /* The kernel tells a descriptor of an error once: enforce_bound, which syncs this one, may be the one that hears of it. */
    pthread_mutex_lock(&set->lock);
    while (file->is_evicted)
        pthread_cond_wait(&set->unpinned, &set->lock);
    pthread_mutex_unlock(&set->lock);
    int err = atomic_load(&file->sync_error);
    return err ? err : sync_descriptor(set, file, fd, datasync);
}

/*
 * Closes descriptors until the bound holds. Called and returns with the lock held, but gives it up for the sync of a dirty
 * file, whose error would be lost with its descriptor. The file stays pinned and dirty meanwhile, and whoever syncs it waits.
 */
static void enforce_bound(struct pbk_file_set *set, unsigned bound)
{
    while (set->n_open > bound) {
        int fd;
        struct pbk_file *file = take_oldest(set, &fd);
        if (file == NULL)
            return;
        if (!atomic_load(&file->is_dirty)) {
            close(fd);
            continue;
        }
        file->fd = fd;
        file->n_pins = 1;
        file->is_evicted = true;
        set->n_open++;
        pthread_mutex_unlock(&set->lock);
        (void)sync_descriptor(set, file, fd, true); /* remembered in the file */
        pthread_mutex_lock(&set->lock);
        file->is_evicted = false;
        if (--file->n_pins == 0) {
            file->fd = -1;
            set->n_open--;
            close(fd);
        }
        pthread_cond_broadcast(&set->unpinned);
    }
}

/*
 * Opens an object whose mode keeps its own owner out: a file of mode 0400 is written by whoever made it or had it open before.
 * Only a worker without privilege meets that. The mode is widened for as long as the open takes; a death in between leaves it
 * so. -EACCES if that is not the reason. Lock held, so that nobody else sees the wide mode and takes it for the file's.
 */
static int open_own(const struct pbk_file *file)
{
    char link[32];
    struct stat st;
    int fd = -EACCES;
    int handle = openat(file->dir_fd, file->path, O_PATH | O_NOFOLLOW | O_CLOEXEC);
    if (handle < 0)
        return -errno;
    if (fstat(handle, &st) != 0 || !S_ISREG(st.st_mode) || st.st_uid != geteuid() || (st.st_mode & 0600) == 0600)
        goto out;
    snprintf(link, sizeof(link), "/proc/self/fd/%d", handle);
    if (chmod(link, (st.st_mode & 07777) | 0600) != 0)
        goto out;
    fd = pbk_open_beneath(file->dir_fd, file->path, file->flags);
    if (chmod(link, st.st_mode & 07777) != 0 && fd >= 0) {
        close(fd);
        fd = -EACCES;
    }
out:
    close(handle);
    return fd;
}

static int open_file(struct pbk_file_set *set, const struct pbk_file *file)
{
    int fd = pbk_open_beneath(file->dir_fd, file->path, file->flags);
    if (fd == -EACCES && file->flags == O_RDWR) {
        pthread_mutex_lock(&set->lock);
        fd = open_own(file);
        pthread_mutex_unlock(&set->lock);
    }
    return fd;
}

bool pbk_file_set_relieve(struct pbk_file_set *set, int err, unsigned *n_tries)
{
    if ((err != -EMFILE && err != -ENFILE) || *n_tries == MAX_RELIEF)
        return false;
    /* Somebody else uses up the descriptors, and may be faster than the caller: half of ours each time, then all. */
    pthread_mutex_lock(&set->lock);
    enforce_bound(set, ++*n_tries == MAX_RELIEF ? 0 : set->n_open / 2);
    pthread_mutex_unlock(&set->lock);
    return true;
}

int pbk_file_acquire(struct pbk_file_set *set, struct pbk_file *file)
{
    pthread_mutex_lock(&set->lock);
    if (file->fd < 0) {
        unsigned n_tries = 0;
        int fd;
        pthread_mutex_unlock(&set->lock);
        do
            fd = open_file(set, file);
        while (fd < 0 && pbk_file_set_relieve(set, fd, &n_tries));
        pthread_mutex_lock(&set->lock);
        if (file->fd >= 0) {
            if (fd >= 0)
                close(fd);
        } else if (fd < 0) {
            pthread_mutex_unlock(&set->lock);
            return fd;
        } else {
            file->fd = fd;
            file->n_pins = 0;
            set->n_open++;
            list_add_newest(set, file);
        }
    }
    if (file->n_pins++ == 0)
        list_remove(set, file);
    int fd = file->fd;
    if (set->n_open > set->max_open)
        enforce_bound(set, set->max_open);
    pthread_mutex_unlock(&set->lock);
    return fd;
}

void pbk_file_release(struct pbk_file_set *set, struct pbk_file *file)
{
    pthread_mutex_lock(&set->lock);
    if (--file->n_pins == 0) {
        list_add_newest(set, file);
        if (set->n_open > set->max_open)
            enforce_bound(set, set->max_open);
    }
    pthread_mutex_unlock(&set->lock);
}

void pbk_file_demote(struct pbk_file_set *set, struct pbk_file *file)
{
    pthread_mutex_lock(&set->lock);
    if (file->fd >= 0 && file->n_pins == 0) {
        list_remove(set, file);
        list_add_oldest(set, file);
    }
    pthread_mutex_unlock(&set->lock);
}

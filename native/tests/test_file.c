/* A descriptor that is taken away while somebody makes its file durable: an error of the disk is told to one of the two only. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <semaphore.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "check.h"
#include "pbk/file.h"

static sem_t began;
static sem_t may_end;
static atomic_uint n_calls;

int __wrap_pbk_fdatasync(int fd);

/* As the kernel does it: the first who asks hears of the error. */
int __wrap_pbk_fdatasync(int fd)
{
    (void)fd;
    if (atomic_fetch_add(&n_calls, 1) > 0)
        return 0;
    sem_post(&began);
    sem_wait(&may_end);
    return -EIO;
}

static struct pbk_file_set set;
static struct pbk_file files[2];

static void *use_other(void *arg)
{
    (void)arg;
    CHECK(pbk_file_acquire(&set, &files[1]) >= 0); /* there may be one: the first has to go */
    pbk_file_release(&set, &files[1]);
    return NULL;
}

static void *make_durable(void *result)
{
    int fd = pbk_file_acquire(&set, &files[0]);
    CHECK(fd >= 0);
    *(int *)result = pbk_file_sync(&set, &files[0], fd, true);
    pbk_file_release(&set, &files[0]);
    return NULL;
}

int main(void)
{
    const char *tmp = getenv("TMPDIR");
    char directory[256];
    snprintf(directory, sizeof(directory), "%s/pbkfs-file.XXXXXX", tmp != NULL ? tmp : "/tmp");
    CHECK(mkdtemp(directory) != NULL);
    int dir_fd = open(directory, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    CHECK(dir_fd >= 0);
    atomic_uint_fast64_t n_sync_errors = 0;
    CHECK(pbk_file_set_init(&set, 1, NULL, &n_sync_errors) == 0);
    const char *names[] = {"0", "1"};
    for (int i = 0; i < 2; i++) {
        int made = openat(dir_fd, names[i], O_CREAT | O_RDWR | O_CLOEXEC, 0600);
        CHECK(made >= 0);
        close(made);
        CHECK(pbk_file_init(&files[i], dir_fd, names[i], O_RDWR) == 0);
    }
    sem_init(&began, 0, 0);
    sem_init(&may_end, 0, 0);

    CHECK(pbk_file_acquire(&set, &files[0]) >= 0);
    atomic_store(&files[0].is_dirty, true);
    pbk_file_release(&set, &files[0]);
    pthread_t evictor;
    pthread_t syncer;
    int result = 0;
    CHECK(pthread_create(&evictor, NULL, use_other, NULL) == 0);
    sem_wait(&began);
    CHECK(pthread_create(&syncer, NULL, make_durable, &result) == 0);
    usleep(50000); /* if it does not wait, it gets that far */
    sem_post(&may_end);
    pthread_join(syncer, NULL);
    pthread_join(evictor, NULL);
    CHECK(result == -EIO);
    CHECK(n_sync_errors == 1);

    for (int i = 0; i < 2; i++) {
        pbk_file_destroy(&set, &files[i]);
        unlinkat(dir_fd, names[i], 0);
    }
    pbk_file_set_destroy(&set);
    close(dir_fd);
    rmdir(directory);
    return 0;
}

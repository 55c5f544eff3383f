/* System calls, whole: see the header. */
#define _GNU_SOURCE
#include "pbk/io.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/openat2.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static int check_range(size_t n, uint64_t off)
{
    uint64_t end;
    return __builtin_add_overflow(off, (uint64_t)n, &end) || end > INT64_MAX ? -EFBIG : 0;
}

ssize_t pbk_pread_full(int fd, void *buf, size_t n, uint64_t off)
{
    uint8_t *p = buf;
    size_t done = 0;
    int err = check_range(n, off);
    if (err)
        return err;
    while (done < n) {
        ssize_t r = pread(fd, p + done, n - done, (off_t)(off + done));
        if (r < 0) {
            if (errno == EINTR)
                continue;
            return -errno;
        }
        if (r == 0)
            break;
        done += (size_t)r;
    }
    return (ssize_t)done;
}

int pbk_pwrite_full(int fd, const void *buf, size_t n, uint64_t off)
{
    struct iovec iov = {.iov_base = (void *)(uintptr_t)buf, .iov_len = n};
    return pbk_pwritev_full(fd, &iov, 1, off);
}

int pbk_pwritev_full(int fd, struct iovec *iov, int n_iov, uint64_t off)
{
    int i = 0;
    for (int k = 0; k < n_iov; k++) {
        int err = check_range(iov[k].iov_len, off);
        if (err)
            return err;
    }
    for (;;) {
        while (i < n_iov && iov[i].iov_len == 0)
            i++;
        if (i == n_iov)
            return 0;
        ssize_t r = pwritev(fd, iov + i, n_iov - i, (off_t)off);
        if (r < 0) {
            if (errno == EINTR)
                continue;
            return -errno;
        }
        if (r == 0)
            return -ENOSPC;
        off += (uint64_t)r;
        for (size_t left = (size_t)r; left > 0;) {
            size_t step = left < iov[i].iov_len ? left : iov[i].iov_len;
            iov[i].iov_base = (uint8_t *)iov[i].iov_base + step;
            iov[i].iov_len -= step;
            left -= step;
            if (iov[i].iov_len == 0)
                i++;
        }
    }
}

int pbk_fdatasync(int fd)
{
    /* Not repeated after a failure: the kernel reports lost pages once and then calls them clean. */
    for (;;) {
        if (fdatasync(fd) == 0)
            return 0;
        if (errno != EINTR)
            return -errno;
    }
}

int pbk_fsync(int fd)
{
    for (;;) {
        if (fsync(fd) == 0)
            return 0;
        if (errno != EINTR)
            return -errno;
    }
}

int pbk_ftruncate(int fd, uint64_t size)
{
    if (size > INT64_MAX)
        return -EFBIG;
    for (;;) {
        if (ftruncate(fd, (off_t)size) == 0)
            return 0;
        if (errno != EINTR)
            return -errno;
    }
}

int pbk_fallocate(int fd, int mode, uint64_t off, uint64_t n)
{
    uint64_t end;
    if (__builtin_add_overflow(off, n, &end) || end > INT64_MAX)
        return -EFBIG;
    for (;;) {
        if (fallocate(fd, mode, (off_t)off, (off_t)n) == 0)
            return 0;
        if (errno != EINTR)
            return -errno;
    }
}

/* The same promise for kernels before 5.6 and for sandboxes without openat2: every component by itself. */
static int open_by_component(int dir_fd, const char *path, uint64_t flags)
{
    char name[NAME_MAX + 1];
    int at = dir_fd;
    int fd;

    for (;;) {
        size_t n = strcspn(path, "/");
        if (n == 0 || n > NAME_MAX || (n == 1 && path[0] == '.') || (n == 2 && path[0] == '.' && path[1] == '.')) {
            fd = -EXDEV;
            break;
        }
        memcpy(name, path, n);
        name[n] = '\0';
        if (path[n] == '\0') {
            fd = openat(at, name, (int)flags | O_NOFOLLOW);
            if (fd < 0)
                fd = -errno;
            break;
        }
        int next = openat(at, name, O_PATH | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
        if (next < 0) {
            fd = -errno;
            break;
        }
        if (at != dir_fd)
            close(at);
        at = next;
        path += n + 1;
    }
    if (at != dir_fd)
        close(at);
    return fd;
}

static int open_confined(int dir_fd, const char *path, uint64_t flags)
{
    struct open_how how = {.flags = flags, .resolve = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS};
    /* EAGAIN: a rename ran beside the look-up and the kernel can't tell whether it stayed beneath. */
    for (int attempt = 0; attempt < 64; attempt++) {
        long fd = syscall(SYS_openat2, dir_fd, path, &how, sizeof(how));
        if (fd >= 0)
            return (int)fd;
        if (errno == ENOSYS)
            return open_by_component(dir_fd, path, flags);
        if (errno != EAGAIN && errno != EINTR)
            return -errno;
    }
    return -EAGAIN;
}

int pbk_open_beneath(int dir_fd, const char *path, int flags)
{
    /* O_NONBLOCK: a fifo put in a store's place must not hang the reader; it means nothing for regular files. */
    uint64_t how = (uint64_t)flags | O_CLOEXEC | O_NONBLOCK | O_NOCTTY;
    int fd = open_confined(dir_fd, path, how | O_NOATIME);
    if (fd == -EPERM)
        fd = open_confined(dir_fd, path, how);
    if (fd < 0)
        return fd;
    struct stat st;
    int err = fstat(fd, &st) == 0 ? (S_ISREG(st.st_mode) ? 0 : -EIO) : -errno;
    if (err) {
        close(fd);
        return err;
    }
    return fd;
}

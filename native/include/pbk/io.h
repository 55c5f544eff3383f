/* System calls that go on after EINTR and short transfers. Stateless; any thread. All return -errno on failure. */
#ifndef PBK_IO_H
#define PBK_IO_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/uio.h>

/* The bytes read: fewer than n only at the end of the file. */
ssize_t pbk_pread_full(int fd, void *buf, size_t n, uint64_t off);

/* 0 if everything was written. After an error any part may have been. */
int pbk_pwrite_full(int fd, const void *buf, size_t n, uint64_t off);
int pbk_pwritev_full(int fd, struct iovec *iov, int n_iov, uint64_t off); /* changes iov */

int pbk_fdatasync(int fd);
int pbk_fsync(int fd);
int pbk_ftruncate(int fd, uint64_t size);
int pbk_fallocate(int fd, int mode, uint64_t off, uint64_t n);

/*
 * Opens a regular file below dir_fd: no component of path may be a symbolic link or lead out of dir_fd. flags is O_RDONLY or
 * O_RDWR; O_CLOEXEC is added, and O_NOATIME where the kernel permits it (a store's files belong to others). -EIO if it is no
 * regular file.
 */
int pbk_open_beneath(int dir_fd, const char *path, int flags);

#endif

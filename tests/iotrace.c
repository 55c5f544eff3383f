/*
 * A library to preload: logs whatever a process changes or makes durable below PBKFS_TRACE_ROOT into PBKFS_TRACE_LOG, for
 * tests/iotrace.py. A change is logged after the call returned and an fsync both before and after it; so a change whose call
 * had returned when the fsync began stands before it in the log, and what the caller was told is never earlier than the log.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

struct record {
    uint32_t total; /* bytes of the record with all that follows */
    uint8_t kind;
    uint8_t flag;
    uint16_t old_len;
    uint16_t new_len;
    uint16_t pid;
    uint32_t mode;
    uint32_t uid;
    uint32_t gid;
    uint64_t ino;
    uint64_t a;
    uint64_t b;
} __attribute__((packed));

static char root[PATH_MAX];
static size_t root_len;
static char log_path[PATH_MAX];

__attribute__((constructor)) static void begin(void)
{
    const char *r = getenv("PBKFS_TRACE_ROOT");
    const char *l = getenv("PBKFS_TRACE_LOG");
    if (r == NULL || l == NULL)
        return;
    snprintf(root, sizeof(root), "%s", r);
    snprintf(log_path, sizeof(log_path), "%s", l);
    root_len = strlen(root);
}

/* Opened for each record: a daemon closes descriptors that it does not know. */
static void put(struct record *rec, const char *old_path, const char *new_path, const struct iovec *data, int n_data,
                size_t length)
{
    int saved = errno;
    struct iovec iov[3 + 64];
    int n = 0;
    rec->old_len = old_path ? (uint16_t)strlen(old_path) : 0;
    rec->new_len = new_path ? (uint16_t)strlen(new_path) : 0;
    rec->pid = (uint16_t)getpid();
    rec->total = (uint32_t)(sizeof(*rec) + rec->old_len + rec->new_len + length);
    iov[n++] = (struct iovec){rec, sizeof(*rec)};
    iov[n++] = (struct iovec){(void *)(uintptr_t)old_path, rec->old_len};
    iov[n++] = (struct iovec){(void *)(uintptr_t)new_path, rec->new_len};
    char *copy = NULL;
    if (n_data > 64) {
        size_t done = 0;
        copy = malloc(length);
        for (int i = 0; copy != NULL && i < n_data && done < length; i++) {
            size_t step = data[i].iov_len < length - done ? data[i].iov_len : length - done;
            memcpy(copy + done, data[i].iov_base, step);
            done += step;
        }
        iov[n++] = (struct iovec){copy, length};
    } else {
        for (int i = 0; i < n_data && length > 0; i++) {
            size_t step = data[i].iov_len < length ? data[i].iov_len : length;
            iov[n++] = (struct iovec){data[i].iov_base, step};
            length -= step;
        }
    }
    int fd = (int)syscall(SYS_openat, AT_FDCWD, log_path, O_WRONLY | O_APPEND | O_CLOEXEC);
    if (fd < 0 || syscall(SYS_writev, fd, iov, n) != (long)rec->total)
        abort();
    syscall(SYS_close, fd);
    free(copy);
    errno = saved;
}

static int is_below(const char *path)
{
    return root_len > 0 && strncmp(path, root, root_len) == 0 && (path[root_len] == '/' || path[root_len] == '\0');
}

static int path_of_fd(int fd, char *path)
{
    char link[64];
    if (root_len == 0 || fd < 0)
        return 0;
    snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, PATH_MAX - 1);
    if (n <= 0)
        return 0;
    path[n] = '\0';
    return is_below(path);
}

/* Whether a name of a call is below the root; its absolute path without links in its directories. */
static int path_of_name(int dir_fd, const char *name, char *path)
{
    char joined[2 * PATH_MAX];
    int saved = errno;
    if (root_len == 0)
        return 0;
    if (name[0] == '/') {
        snprintf(joined, sizeof(joined), "%s", name);
    } else {
        char at[PATH_MAX];
        if (dir_fd == AT_FDCWD) {
            if (getcwd(at, sizeof(at)) == NULL)
                return 0;
        } else {
            char link[64];
            snprintf(link, sizeof(link), "/proc/self/fd/%d", dir_fd);
            ssize_t n = readlink(link, at, sizeof(at) - 1);
            if (n <= 0)
                return 0;
            at[n] = '\0';
        }
        snprintf(joined, sizeof(joined), "%s/%s", at, name);
    }
    size_t end = strlen(joined);
    while (end > 1 && joined[end - 1] == '/')
        joined[--end] = '\0';
    if (is_below(joined)) {
        snprintf(path, PATH_MAX, "%s", joined);
        errno = saved;
        return 1;
    }
    char *slash = strrchr(joined, '/');
    char real[PATH_MAX];
    *slash = '\0';
    int found = realpath(slash == joined ? "/" : joined, real) != NULL;
    if (found)
        snprintf(path, PATH_MAX, "%.*s/%.*s", PATH_MAX / 2, real, PATH_MAX / 2 - 2, slash + 1);
    errno = saved;
    return found && is_below(path);
}

static struct record stat_record(char kind, const struct stat *st)
{
    return (struct record){.kind = (uint8_t)kind, .ino = st->st_ino, .mode = st->st_mode, .uid = st->st_uid, .gid = st->st_gid};
}

#define NEXT(name)                                                                                                     \
    static __typeof__(&name) next;                                                                                     \
    if (next == NULL)                                                                                                  \
        next = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

/* ---- opening ---- */

static void opened(int fd, int flags)
{
    char path[PATH_MAX];
    struct stat st;
    int saved = errno;
    if (fd >= 0 && (flags & (O_CREAT | O_TRUNC)) && path_of_fd(fd, path) && fstat(fd, &st) == 0 && S_ISREG(st.st_mode)) {
        struct record rec = stat_record('O', &st);
        rec.flag = (flags & O_TRUNC) != 0;
        put(&rec, path, NULL, NULL, 0, 0);
    }
    errno = saved;
}

#define OPEN_AT(name)                                                                                                  \
    int name(int dir_fd, const char *path, int flags, ...)                                                             \
    {                                                                                                                  \
        mode_t mode = 0;                                                                                               \
        if (flags & (O_CREAT | O_TMPFILE)) {                                                                           \
            va_list args;                                                                                              \
            va_start(args, flags);                                                                                     \
            mode = va_arg(args, mode_t);                                                                               \
            va_end(args);                                                                                              \
        }                                                                                                              \
        NEXT(name);                                                                                                    \
        int fd = next(dir_fd, path, flags, mode);                                                                      \
        opened(fd, flags);                                                                                             \
        return fd;                                                                                                     \
    }
#define OPEN(name)                                                                                                     \
    int name(const char *path, int flags, ...)                                                                         \
    {                                                                                                                  \
        mode_t mode = 0;                                                                                               \
        if (flags & (O_CREAT | O_TMPFILE)) {                                                                           \
            va_list args;                                                                                              \
            va_start(args, flags);                                                                                     \
            mode = va_arg(args, mode_t);                                                                               \
            va_end(args);                                                                                              \
        }                                                                                                              \
        NEXT(name);                                                                                                    \
        int fd = next(path, flags, mode);                                                                              \
        opened(fd, flags);                                                                                             \
        return fd;                                                                                                     \
    }
OPEN(open)
OPEN(open64)
OPEN_AT(openat)
OPEN_AT(openat64)

/* ---- bytes and size ---- */

static void wrote(int fd, const struct iovec *iov, int n, off_t off, ssize_t done)
{
    char path[PATH_MAX];
    struct stat st;
    int saved = errno;
    if (done > 0 && path_of_fd(fd, path) && fstat(fd, &st) == 0 && S_ISREG(st.st_mode)) {
        struct record rec = stat_record('W', &st);
        rec.a = (uint64_t)(off >= 0 ? off : lseek(fd, 0, SEEK_CUR) - done);
        put(&rec, NULL, NULL, iov, n, (size_t)done);
    }
    errno = saved;
}

ssize_t write(int fd, const void *data, size_t length)
{
    NEXT(write);
    ssize_t done = next(fd, data, length);
    struct iovec iov = {(void *)(uintptr_t)data, length};
    wrote(fd, &iov, 1, -1, done);
    return done;
}
#define PWRITE(name)                                                                                                   \
    ssize_t name(int fd, const void *data, size_t length, off_t off)                                                   \
    {                                                                                                                  \
        NEXT(name);                                                                                                    \
        ssize_t done = next(fd, data, length, off);                                                                    \
        struct iovec iov = {(void *)(uintptr_t)data, length};                                                          \
        wrote(fd, &iov, 1, off, done);                                                                                 \
        return done;                                                                                                   \
    }
PWRITE(pwrite)
PWRITE(pwrite64)
ssize_t writev(int fd, const struct iovec *iov, int n)
{
    NEXT(writev);
    ssize_t done = next(fd, iov, n);
    wrote(fd, iov, n, -1, done);
    return done;
}
#define PWRITEV(name)                                                                                                  \
    ssize_t name(int fd, const struct iovec *iov, int n, off_t off)                                                    \
    {                                                                                                                  \
        NEXT(name);                                                                                                    \
        ssize_t done = next(fd, iov, n, off);                                                                          \
        wrote(fd, iov, n, off, done);                                                                                  \
        return done;                                                                                                   \
    }
PWRITEV(pwritev)
PWRITEV(pwritev64)

static void sized(char kind, int fd, uint64_t a, uint64_t b, int mode, int result)
{
    char path[PATH_MAX];
    struct stat st;
    int saved = errno;
    if (result == 0 && path_of_fd(fd, path) && fstat(fd, &st) == 0) {
        struct record rec = stat_record(kind, &st);
        rec.a = a;
        rec.b = b;
        rec.flag = (uint8_t)mode;
        put(&rec, NULL, NULL, NULL, 0, 0);
    }
    errno = saved;
}
#define FTRUNCATE(name)                                                                                                \
    int name(int fd, off_t size)                                                                                       \
    {                                                                                                                  \
        NEXT(name);                                                                                                    \
        int result = next(fd, size);                                                                                   \
        sized('T', fd, (uint64_t)size, 0, 0, result);                                                                  \
        return result;                                                                                                 \
    }
FTRUNCATE(ftruncate)
FTRUNCATE(ftruncate64)
#define FALLOCATE(name)                                                                                                \
    int name(int fd, int mode, off_t off, off_t length)                                                                \
    {                                                                                                                  \
        NEXT(name);                                                                                                    \
        int result = next(fd, mode, off, length);                                                                      \
        sized('F', fd, (uint64_t)off, (uint64_t)length, mode, result);                                                 \
        return result;                                                                                                 \
    }
FALLOCATE(fallocate)
FALLOCATE(fallocate64)
#define POSIX_FALLOCATE(name)                                                                                          \
    int name(int fd, off_t off, off_t length)                                                                          \
    {                                                                                                                  \
        NEXT(name);                                                                                                    \
        int result = next(fd, off, length);                                                                            \
        sized('F', fd, (uint64_t)off, (uint64_t)length, 0, result);                                                    \
        return result;                                                                                                 \
    }
POSIX_FALLOCATE(posix_fallocate)
POSIX_FALLOCATE(posix_fallocate64)

ssize_t copy_file_range(int in, off64_t *in_off, int out, off64_t *out_off, size_t length, unsigned flags)
{
    char path[PATH_MAX];
    NEXT(copy_file_range);
    if (path_of_fd(out, path)) {
        errno = ENOSYS;
        return -1;
    }
    return next(in, in_off, out, out_off, length, flags);
}

/* ---- durability ---- */

static uint64_t sync_begins(int fd, char kind)
{
    static uint32_t counter;
    char path[PATH_MAX];
    struct stat st;
    if (!path_of_fd(fd, path) || fstat(fd, &st) != 0)
        return 0;
    struct record rec = stat_record(kind, &st);
    rec.a = (uint64_t)getpid() << 32 | __atomic_add_fetch(&counter, 1, __ATOMIC_RELAXED);
    put(&rec, NULL, NULL, NULL, 0, 0);
    return rec.a;
}
static void sync_ended(uint64_t token, int result)
{
    if (token == 0 || result != 0)
        return;
    struct record rec = {.kind = 'E', .a = token};
    put(&rec, NULL, NULL, NULL, 0, 0);
}
#define SYNC(name, kind)                                                                                               \
    int name(int fd)                                                                                                   \
    {                                                                                                                  \
        NEXT(name);                                                                                                    \
        uint64_t token = sync_begins(fd, kind);                                                                        \
        int result = next(fd);                                                                                         \
        sync_ended(token, result);                                                                                     \
        return result;                                                                                                 \
    }
SYNC(fsync, 'S')
SYNC(fdatasync, 'D')
SYNC(syncfs, 'Y')

/* ---- names ---- */

static void named(char kind, int dir_fd, const char *name, int result)
{
    char path[PATH_MAX];
    if (result == 0 && path_of_name(dir_fd, name, path)) {
        struct stat st = {0};
        int saved = errno;
        lstat(path, &st);
        errno = saved;
        struct record rec = stat_record(kind, &st);
        put(&rec, path, NULL, NULL, 0, 0);
    }
}
int unlink(const char *name)
{
    NEXT(unlink);
    int result = next(name);
    named('U', AT_FDCWD, name, result);
    return result;
}
int rmdir(const char *name)
{
    NEXT(rmdir);
    int result = next(name);
    named('U', AT_FDCWD, name, result);
    return result;
}
int unlinkat(int dir_fd, const char *name, int flags)
{
    NEXT(unlinkat);
    int result = next(dir_fd, name, flags);
    named('U', dir_fd, name, result);
    return result;
}
int mkdir(const char *name, mode_t mode)
{
    NEXT(mkdir);
    int result = next(name, mode);
    named('K', AT_FDCWD, name, result);
    return result;
}
int mkdirat(int dir_fd, const char *name, mode_t mode)
{
    NEXT(mkdirat);
    int result = next(dir_fd, name, mode);
    named('K', dir_fd, name, result);
    return result;
}
static void renamed(int old_fd, const char *old_name, int new_fd, const char *new_name, int result)
{
    char old_path[PATH_MAX];
    char new_path[PATH_MAX];
    if (result == 0 && path_of_name(old_fd, old_name, old_path) && path_of_name(new_fd, new_name, new_path)) {
        struct record rec = {.kind = 'R'};
        put(&rec, old_path, new_path, NULL, 0, 0);
    }
}
int rename(const char *old_name, const char *new_name)
{
    NEXT(rename);
    int result = next(old_name, new_name);
    renamed(AT_FDCWD, old_name, AT_FDCWD, new_name, result);
    return result;
}
int renameat(int old_fd, const char *old_name, int new_fd, const char *new_name)
{
    NEXT(renameat);
    int result = next(old_fd, old_name, new_fd, new_name);
    renamed(old_fd, old_name, new_fd, new_name, result);
    return result;
}
static void linked(int old_fd, const char *old_name, int new_fd, const char *new_name, int result)
{
    char old_path[PATH_MAX];
    char new_path[PATH_MAX];
    if (result == 0 && path_of_name(old_fd, old_name, old_path) && path_of_name(new_fd, new_name, new_path)) {
        struct record rec = {.kind = 'L'};
        put(&rec, old_path, new_path, NULL, 0, 0);
    }
}
int link(const char *old_name, const char *new_name)
{
    NEXT(link);
    int result = next(old_name, new_name);
    linked(AT_FDCWD, old_name, AT_FDCWD, new_name, result);
    return result;
}
int linkat(int old_fd, const char *old_name, int new_fd, const char *new_name, int flags)
{
    NEXT(linkat);
    int result = next(old_fd, old_name, new_fd, new_name, flags);
    linked(old_fd, old_name, new_fd, new_name, result);
    return result;
}

/* ---- attributes ---- */

static void changed(int dir_fd, const char *name, int flags, int result)
{
    struct stat st;
    int saved = errno;
    if (root_len > 0 && result == 0 &&
        (name == NULL ? fstat(dir_fd, &st) : fstatat(dir_fd, name, &st, flags)) == 0) {
        struct record rec = stat_record('A', &st);
        put(&rec, NULL, NULL, NULL, 0, 0);
    }
    errno = saved;
}
int chmod(const char *name, mode_t mode)
{
    NEXT(chmod);
    int result = next(name, mode);
    changed(AT_FDCWD, name, 0, result);
    return result;
}
int fchmod(int fd, mode_t mode)
{
    NEXT(fchmod);
    int result = next(fd, mode);
    changed(fd, NULL, 0, result);
    return result;
}
int fchmodat(int dir_fd, const char *name, mode_t mode, int flags)
{
    NEXT(fchmodat);
    int result = next(dir_fd, name, mode, flags);
    changed(dir_fd, name, flags, result);
    return result;
}
int chown(const char *name, uid_t uid, gid_t gid)
{
    NEXT(chown);
    int result = next(name, uid, gid);
    changed(AT_FDCWD, name, 0, result);
    return result;
}
int lchown(const char *name, uid_t uid, gid_t gid)
{
    NEXT(lchown);
    int result = next(name, uid, gid);
    changed(AT_FDCWD, name, AT_SYMLINK_NOFOLLOW, result);
    return result;
}
int fchown(int fd, uid_t uid, gid_t gid)
{
    NEXT(fchown);
    int result = next(fd, uid, gid);
    changed(fd, NULL, 0, result);
    return result;
}
int fchownat(int dir_fd, const char *name, uid_t uid, gid_t gid, int flags)
{
    NEXT(fchownat);
    int result = next(dir_fd, name, uid, gid, flags);
    changed(dir_fd, name, flags, result);
    return result;
}

/*
 * What is agreed upon with the kernel at INIT, and the names of its requests. Pure functions, any thread.
 */
#include "pbk/fuse_proto.h"

#include <string.h>

/*
 * Wanted, and why:
 *   WRITEBACK_CACHE     writes are batched and the kernel owns the size, so that lseek(END) costs no round trip
 *   EXPLICIT_INVAL_DATA and not AUTO_INVAL_DATA: a changed mtime must not drop cached pages, nobody else writes
 *   CACHE_SYMLINKS      pg_wal and pg_tblspc are read through links
 *   PARALLEL_DIROPS, DO_READDIRPLUS (pyfuse3 knows no other readdir), ASYNC_READ, ASYNC_DIO, BIG_WRITES, MAX_PAGES
 *   HAS_RESEND          lets a later worker take over what this one had read
 * Not wanted, and why:
 *   ATOMIC_O_TRUNC      OPEN would have to truncate; without it a truncation always is a SETATTR
 *   PASSTHROUGH         the kernel refuses it together with WRITEBACK_CACHE
 *   HANDLE_KILLPRIV     we would have to clear set-user-id bits at every write, chown and truncation; without it the kernel
 *                       asks for that with SETATTR, and sends nothing more for files without such bits
 *   DONT_MASK           so the kernel applies the caller's umask before it sends a mode
 *   SPLICE_*            the data would pass a pipe; requests are read and answered with one system call each
 */
#define WANTED                                                                                                         \
    ((uint64_t)FUSE_ASYNC_READ | FUSE_BIG_WRITES | FUSE_ASYNC_DIO | FUSE_PARALLEL_DIROPS | FUSE_DO_READDIRPLUS |       \
     FUSE_MAX_PAGES | FUSE_CACHE_SYMLINKS | FUSE_EXPLICIT_INVAL_DATA | FUSE_WRITEBACK_CACHE | FUSE_INIT_EXT |          \
     FUSE_HAS_RESEND)

/* More than any read-ahead: the kernel takes the smaller one of this and the device's read_ahead_kb. */
#define MAX_READAHEAD (128u << 20)

/* Background requests (write-back, read-ahead) at once; the kernel's 12 would starve a checkpoint. Throttling starts at
 * three quarters, the kernel's own proportion. */
#define MAX_BACKGROUND 128u

/* Without MAX_PAGES a request has 32 pages. Source: FUSE_DEFAULT_MAX_PAGES_PER_REQ. */
#define DEFAULT_MAX_IO (32u * 4096u)

void pbk_fuse_init_reply(const struct fuse_init_in *request, size_t length, struct fuse_init_out *reply)
{
    uint64_t offered = request->flags;
    if ((request->flags & FUSE_INIT_EXT) && length >= offsetof(struct fuse_init_in, flags2) + sizeof request->flags2)
        offered |= (uint64_t)request->flags2 << 32;
    uint64_t flags = WANTED & offered;

    memset(reply, 0, sizeof *reply);
    reply->major = PBK_FUSE_MAJOR;
    reply->minor = PBK_FUSE_MINOR;
    reply->max_readahead = MAX_READAHEAD;
    reply->flags = (uint32_t)flags;
    reply->flags2 = (uint32_t)(flags >> 32);
    reply->max_background = MAX_BACKGROUND;
    reply->congestion_threshold = MAX_BACKGROUND / 4 * 3;
    reply->max_write = flags & FUSE_MAX_PAGES ? PBK_FUSE_MAX_IO : DEFAULT_MAX_IO;
    reply->max_pages = flags & FUSE_MAX_PAGES ? PBK_FUSE_MAX_PAGES : 0;
    reply->time_gran = 1;
}

const char *pbk_fuse_opcode_name(uint32_t opcode)
{
    switch (opcode) {
    case FUSE_LOOKUP:
        return "lookup";
    case FUSE_FORGET:
        return "forget";
    case FUSE_GETATTR:
        return "getattr";
    case FUSE_SETATTR:
        return "setattr";
    case FUSE_READLINK:
        return "readlink";
    case FUSE_SYMLINK:
        return "symlink";
    case FUSE_MKNOD:
        return "mknod";
    case FUSE_MKDIR:
        return "mkdir";
    case FUSE_UNLINK:
        return "unlink";
    case FUSE_RMDIR:
        return "rmdir";
    case FUSE_RENAME:
        return "rename";
    case FUSE_LINK:
        return "link";
    case FUSE_OPEN:
        return "open";
    case FUSE_READ:
        return "read";
    case FUSE_WRITE:
        return "write";
    case FUSE_STATFS:
        return "statfs";
    case FUSE_RELEASE:
        return "release";
    case FUSE_FSYNC:
        return "fsync";
    case FUSE_SETXATTR:
        return "setxattr";
    case FUSE_GETXATTR:
        return "getxattr";
    case FUSE_LISTXATTR:
        return "listxattr";
    case FUSE_REMOVEXATTR:
        return "removexattr";
    case FUSE_FLUSH:
        return "flush";
    case FUSE_INIT:
        return "init";
    case FUSE_OPENDIR:
        return "opendir";
    case FUSE_READDIR:
        return "readdir";
    case FUSE_RELEASEDIR:
        return "releasedir";
    case FUSE_FSYNCDIR:
        return "fsyncdir";
    case FUSE_CREATE:
        return "create";
    case FUSE_INTERRUPT:
        return "interrupt";
    case FUSE_IOCTL:
        return "ioctl";
    case FUSE_POLL:
        return "poll";
    case FUSE_BATCH_FORGET:
        return "batch_forget";
    case FUSE_FALLOCATE:
        return "fallocate";
    case FUSE_READDIRPLUS:
        return "readdirplus";
    case FUSE_RENAME2:
        return "rename2";
    case FUSE_LSEEK:
        return "lseek";
    case FUSE_COPY_FILE_RANGE:
        return "copy_file_range";
    case FUSE_SYNCFS:
        return "syncfs";
    case FUSE_TMPFILE:
        return "tmpfile";
    case PBK_FUSE_STATX:
        return "statx";
    case PBK_FUSE_COPY_FILE_RANGE_64:
        return "copy_file_range_64";
    default:
        return NULL;
    }
}

/*
 * The kernel's FUSE protocol, as far as the dispatcher speaks it.
 *
 * The structures are those of <linux/fuse.h> 7.38 (Debian 12). What came later and is used here is declared below, with the
 * version of the protocol and of the kernel that brought it. Included by the dispatcher's files only.
 */
#ifndef PBK_FUSE_PROTO_H
#define PBK_FUSE_PROTO_H

#include <linux/fuse.h>
#include <stddef.h>
#include <stdint.h>

/* What we say to speak. The structures of 7.38 are complete for every flag that is asked for below. */
#define PBK_FUSE_MAJOR 7u
#define PBK_FUSE_MINOR 38u

/* 7.39, Linux 6.6. Named apart from the header's enum, which may or may not have them. */
#define PBK_FUSE_STATX 52u
/* 7.45, Linux 6.18 */
#define PBK_FUSE_COPY_FILE_RANGE_64 53u

/* 7.40, Linux 6.9: the kernel can be asked to send again what a dead worker had taken. */
#ifndef FUSE_HAS_RESEND
#define FUSE_HAS_RESEND (1ULL << 39)
#endif

/* The same version: the notification that asks for it, and what the kernel then sets in the number of such a request. An answer
 * has to name it with that bit. */
#define PBK_FUSE_NOTIFY_RESEND 7
#define PBK_FUSE_UNIQUE_RESEND (1ULL << 63)

/* The longest read or write we agree to, and the pages that makes. */
#define PBK_FUSE_MAX_IO (1u << 20)
#define PBK_FUSE_MAX_PAGES (PBK_FUSE_MAX_IO / 4096u)

/* Room for the header and the longest argument in front of the data of a write. Source: fuse_dev_do_read() wants
 * max(FUSE_MIN_READ_BUFFER, sizeof(fuse_in_header) + sizeof(fuse_write_in) + max_write) at least. */
#define PBK_FUSE_BUFFER (PBK_FUSE_MAX_IO + 4096u)

/* For how long names are valid: the mount is the only writer. Python says the same (operations.VALID_S). */
#define PBK_FUSE_VALID_S (3650u * 86400u)

/* An errno that the kernel takes. Source: fuse_dev_do_write() refuses a reply with error > 0 or <= -512, which would leave
 * the caller waiting for ever. */
static inline int32_t pbk_fuse_error(int32_t error)
{
    return error > 0 || error <= -512 ? -5 /* EIO */ : error;
}

/*
 * The answer to INIT. request is what the kernel sent, length its bytes (older kernels send less). The flags are those that
 * we want and the kernel offered.
 */
void pbk_fuse_init_reply(const struct fuse_init_in *request, size_t length, struct fuse_init_out *reply);

/* "read", "write", …; NULL for an opcode without a name here. */
const char *pbk_fuse_opcode_name(uint32_t opcode);

#endif

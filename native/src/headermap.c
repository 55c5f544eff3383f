/*
 * page_header_map: one zlib stream per data file, an array of 24-byte entries and a closing one.
 *
 * Source: pg_probackup src/pg_probackup.h, BackupPageHeader2; src/data.c, get_data_file_headers().
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "pbk/bytes.h"
#include "pbk/crc32c.h"
#include "pbk/io.h"
#include "pbk/node.h"
#include "pbk/pagestream.h"

#define ENTRY 24u
/* The most that deflate makes of a byte. Source: zlib.h, "Maximum Compression Factor". */
#define DEFLATE_RATIO 1032u
#define ENTRY_BLOCK 8u
#define ENTRY_POS 12u

static int check_entries(const uint8_t *entries, uint32_t n_headers, uint64_t stored_size, struct pbk_page_walk *walk)
{
    int64_t next_block = 0;
    for (uint32_t i = 0; i < n_headers; i++) {
        const uint8_t *entry = entries + (size_t)i * ENTRY;
        int64_t block = (int32_t)pbk_get_u32(entry + ENTRY_BLOCK);
        int64_t pos = (int32_t)pbk_get_u32(entry + ENTRY_POS);
        int64_t end = (int32_t)pbk_get_u32(entry + ENTRY + ENTRY_POS);
        if (block < next_block || block >= (int64_t)PBK_MAX_SEGMENT_BLOCKS) {
            walk->reason = "header map has blocks out of order";
            return -EBADMSG;
        }
        int64_t length = end - pos - (int64_t)PBK_RECORD_HEADER;
        if (pos < 0 || length < 1 || length > (int64_t)PBK_BLCKSZ || (uint64_t)end > stored_size) {
            walk->reason = "header map has an impossible position";
            return -EBADMSG;
        }
        next_block = block + 1;
    }
    return 0;
}

int pbk_headermap_walk(int map_fd, int64_t off, int64_t size, uint32_t crc, uint32_t n_headers, uint64_t stored_size,
                       struct pbk_inflater *inflater, pbk_page_visit visit, void *arg, struct pbk_page_walk *walk)
{
    uint8_t *packed = NULL;
    uint8_t *entries = NULL;
    int err = -EBADMSG;

    memset(walk, 0, sizeof(*walk));
    /* A record takes at least 9 bytes of the stored file, which bounds the number of headers before anything is allocated. */
    if (stored_size > UINT32_MAX || (uint64_t)n_headers * (PBK_RECORD_HEADER + 1) > stored_size) {
        walk->reason = "list has more headers than the stored file has room for";
        return -EBADMSG;
    }
    size_t n = ((size_t)n_headers + 1) * ENTRY;
    /* zlib's worst case is 5 bytes in 16 KiB and a few. */
    if (off < 0 || size <= 0 || (uint64_t)size > n + n / 1000 + 64 || off > INT64_MAX - size) {
        walk->reason = "list has an impossible place in the header map";
        return -EBADMSG;
    }
    /* Neither may be larger than what is really there lets expect, or a lying list could have any amount of memory. */
    struct stat st;
    if (fstat(map_fd, &st) != 0)
        return -errno;
    if (off + size > st.st_size) {
        walk->reason = "header map is truncated";
        return -EBADMSG;
    }
    if (n / DEFLATE_RATIO > (uint64_t)size) {
        walk->reason = "list has more headers than its part of the header map";
        return -EBADMSG;
    }
    packed = malloc((size_t)size);
    entries = malloc(n);
    if (packed == NULL || entries == NULL) {
        err = -ENOMEM;
        goto out;
    }
    ssize_t got = pbk_pread_full(map_fd, packed, (size_t)size, (uint64_t)off);
    if (got < 0) {
        err = (int)got;
        goto out;
    }
    if (got != (ssize_t)size) {
        walk->reason = "header map is truncated";
        goto out;
    }
    if (pbk_inflate(inflater, packed, (size_t)size, entries, n) != 0) {
        walk->reason = "header map does not inflate";
        goto out;
    }
    if (pbk_crc32c(0, entries, n) != crc) {
        walk->reason = "header map has a wrong checksum";
        goto out;
    }
    err = check_entries(entries, n_headers, stored_size, walk);
    for (uint32_t i = 0; err == 0 && i < n_headers; i++) {
        const uint8_t *entry = entries + (size_t)i * ENTRY;
        uint32_t pos = pbk_get_u32(entry + ENTRY_POS);
        struct pbk_page_record record = {
            .block = pbk_get_u32(entry + ENTRY_BLOCK),
            .length = pbk_get_u32(entry + ENTRY + ENTRY_POS) - pos - PBK_RECORD_HEADER,
            .pos = pos,
        };
        err = visit != NULL ? visit(arg, &record) : 0;
        if (err == 0) {
            walk->n_pages++;
            walk->end_block = record.block + 1;
        }
    }
out:
    free(packed);
    free(entries);
    return err;
}

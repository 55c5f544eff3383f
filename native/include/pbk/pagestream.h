/*
 * pg_probackup's two descriptions of a stored data file: the records themselves, and the header map (2.4.0 and later).
 * Both are read from bytes nobody vouches for: every length and offset is checked before it is used. Any thread.
 */
#ifndef PBK_PAGESTREAM_H
#define PBK_PAGESTREAM_H

#include <stdbool.h>
#include <stdint.h>

#include "pbk/inflate.h"

#define PBK_RECORD_HEADER 8u

/* Highest number of blocks in one segment file that is believed (128 GiB): bounds what a damaged header can make us allocate. */
#define PBK_MAX_SEGMENT_BLOCKS (1u << 24)

struct pbk_page_record {
    uint32_t block;
    uint32_t length; /* of the payload, 1 … 8192; 8192 is the page as it is */
    uint64_t pos;    /* of the record's 8-byte header in the stored file */
};

/* Called for each record in ascending block order. Another return value than 0 ends the walk and is its result. */
typedef int (*pbk_page_visit)(void *arg, const struct pbk_page_record *record);

struct pbk_page_walk {
    uint64_t n_pages;
    uint32_t end_block; /* highest visited block + 1 */
    bool has_marker;
    uint32_t marker;    /* blocks the file had, by a truncation marker (before 2.3.0) */
    const char *reason; /* what is wrong, where the result is -EBADMSG */
};

/* Walks the records of a stored file. 0, -EBADMSG (malformed; what was visited before is right), or another -errno, which is the
 * machine's. visit may be NULL. */
int pbk_pages_walk(int fd, uint64_t stored_size, bool padded, pbk_page_visit visit, void *arg,
                   struct pbk_page_walk *walk);

/* Visits the records which the header map has for one file. On -EBADMSG about the map nothing was visited. */
int pbk_headermap_walk(int map_fd, int64_t off, int64_t size, uint32_t crc, uint32_t n_headers, uint64_t stored_size,
                       struct pbk_inflater *inflater, pbk_page_visit visit, void *arg, struct pbk_page_walk *walk);

#endif

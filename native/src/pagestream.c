/* Walking the records of stored data files: see the header. */
#include "pbk/pagestream.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "pbk/bytes.h"
#include "pbk/io.h"
#include "pbk/node.h"

/* Source: pg_probackup src/data.c, PageIsTruncated. */
#define TRUNCATION_MARKER (-2)

/* Compressed records are a few hundred bytes, so one read covers hundreds of headers. */
#define WINDOW (256u * 1024u)

struct window {
    int fd;
    uint64_t file_size;
    uint64_t start;
    size_t n;
    uint8_t *bytes;
};

static int window_get(struct window *w, uint64_t pos, const uint8_t **header)
{
    if (pos < w->start || pos + PBK_RECORD_HEADER > w->start + w->n) {
        uint64_t left = w->file_size - pos;
        size_t want = left < WINDOW ? (size_t)left : WINDOW;
        ssize_t r = pbk_pread_full(w->fd, w->bytes, want, pos);
        if (r < 0)
            return (int)r;
        w->start = pos;
        w->n = (size_t)r;
        if (w->n < PBK_RECORD_HEADER)
            return -EBADMSG;
    }
    *header = w->bytes + (pos - w->start);
    return 0;
}

int pbk_pages_walk(int fd, uint64_t stored_size, bool padded, pbk_page_visit visit, void *arg,
                   struct pbk_page_walk *walk)
{
    struct window w = {.fd = fd, .file_size = stored_size};
    uint64_t pos = 0;
    int err = 0;

    memset(walk, 0, sizeof(*walk));
    if (stored_size > UINT32_MAX) {
        walk->reason = "stored file is longer than any segment can be";
        return -EBADMSG;
    }
    struct stat st;
    if (fstat(fd, &st) != 0)
        return -errno;
    uint64_t file_size = (uint64_t)st.st_size;
    w.bytes = malloc(WINDOW);
    if (w.bytes == NULL)
        return -ENOMEM;
    while (pos < stored_size) {
        const uint8_t *header = NULL;
        if (stored_size - pos < PBK_RECORD_HEADER) {
            walk->reason = "record header is cut off";
            err = -EBADMSG;
            break;
        }
        err = window_get(&w, pos, &header);
        if (err) {
            if (err == -EBADMSG)
                walk->reason = "stored file is shorter than listed";
            break;
        }
        uint32_t block = pbk_get_u32(header);
        int32_t size = (int32_t)pbk_get_u32(header + 4);
        if (size == TRUNCATION_MARKER) {
            walk->has_marker = true;
            walk->marker = block;
            break;
        }
        err = -EBADMSG;
        if (size <= 0 || size > (int32_t)PBK_BLCKSZ) {
            walk->reason = "record has an impossible length";
            break;
        }
        if (block >= PBK_MAX_SEGMENT_BLOCKS || block < walk->end_block) {
            walk->reason = "blocks are not in ascending order";
            break;
        }
        uint64_t room = padded ? ((uint64_t)size + 7) & ~(uint64_t)7 : (uint64_t)size;
        if (stored_size - pos - PBK_RECORD_HEADER < room) {
            walk->reason = "last record is cut off";
            break;
        }
        /* Only headers are read here: that the payload is there has to be asked. */
        if (pos + PBK_RECORD_HEADER + room > file_size) {
            walk->reason = "stored file is shorter than listed";
            break;
        }
        struct pbk_page_record record = {.block = block, .length = (uint32_t)size, .pos = pos};
        err = visit != NULL ? visit(arg, &record) : 0;
        if (err)
            break;
        walk->n_pages++;
        walk->end_block = block + 1;
        pos += PBK_RECORD_HEADER + room;
    }
    if (err == 0 && file_size < stored_size) {
        walk->reason = "stored file is shorter than listed";
        err = -EBADMSG;
    }
    free(w.bytes);
    return err;
}

/*
 * Header maps. The first byte says what the input is: the entries, which are packed here and get the right crc, or the packed
 * bytes themselves; and whether place and counts are right or the input's.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <zlib.h>

#include "fuzz_file.h"
#include "pbk/crc32c.h"
#include "pbk/node.h"
#include "pbk/pagestream.h"

struct seen {
    uint64_t stored_size;
    int64_t last_block;
};

static int check_record(void *arg, const struct pbk_page_record *record)
{
    struct seen *seen = arg;
    CHECK(record->length >= 1 && record->length <= PBK_BLCKSZ);
    CHECK(record->block < PBK_MAX_SEGMENT_BLOCKS && (int64_t)record->block > seen->last_block);
    CHECK(record->pos + PBK_RECORD_HEADER + record->length <= seen->stored_size);
    seen->last_block = record->block;
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    struct input in = {data, n};
    uint8_t flags = take_u8(&in);
    struct seen seen = {.stored_size = take_u32(&in), .last_block = -1};
    int64_t off = flags & 1 ? (int64_t)take_u32(&in) << 16 : 0;
    uint32_t n_headers = flags & 2 ? take_u32(&in) : (uint32_t)(in.n / 24 ? in.n / 24 - 1 : 0);
    uint32_t crc = pbk_crc32c(0, in.data, in.n);
    uLongf packed_n = compressBound(in.n);
    uint8_t *packed = malloc(packed_n);
    CHECK(packed != NULL);
    if (flags & 4) {
        packed_n = in.n;
        memcpy(packed, in.data, in.n);
    } else {
        CHECK(compress(packed, &packed_n, in.data, in.n) == Z_OK);
    }
    int64_t size = flags & 8 ? (int64_t)take_u32(&in) : (int64_t)packed_n;
    int fd = make_memory_file(packed, packed_n);
    struct pbk_inflater *inflater = pbk_inflater_new();
    struct pbk_page_walk walk;
    CHECK(inflater != NULL);
    int err = pbk_headermap_walk(fd, off, size, crc, n_headers, seen.stored_size, inflater, check_record, &seen, &walk);
    CHECK(err == 0 || (err == -EBADMSG && walk.reason != NULL));
    CHECK(err == 0 || seen.last_block < 0);
    pbk_inflater_free(inflater);
    close(fd);
    free(packed);
    return 0;
}

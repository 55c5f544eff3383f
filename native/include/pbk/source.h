/*
 * Where a file's bytes come from below the diff: one source is one file of a base or one object of a sealed layer.
 * Immutable after it is made, but for the descriptor inside of its pbk_file.
 */
#ifndef PBK_SOURCE_H
#define PBK_SOURCE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "pbk/file.h"

#define PBK_MAX_SOURCES 4096u

enum pbk_source_kind {
    PBK_SOURCE_RAW,    /* a plain file: its bytes are the file's bytes */
    PBK_SOURCE_PAGES,  /* a stored data file of one backup of a chain */
    PBK_SOURCE_OBJECT, /* an object of a sealed layer */
};

enum pbk_compress {
    PBK_COMPRESS_NONE = 0,
    PBK_COMPRESS_ZLIB = 1,
    PBK_COMPRESS_PGLZ = 2,
};

/* What the caller says about a source. Everything pointed to is copied; descriptors have to outlive the nodes. */
struct pbk_source_spec {
    enum pbk_source_kind kind;
    int dir_fd;
    const char *path;
    const char *label; /* the layer in log lines */
    uint64_t size;     /* raw: length of the file; pages: stored length */
    uint32_t limit;    /* pages: blocks from it on are ignored; object: blocks from it on are the object's */
    /* pages */
    int compress;
    bool is_padded;    /* payloads are padded to 8 (before 2.4.0) */
    bool is_zlib_8192; /* a payload of 8192 bytes can be compressed (before 2.0.23) */
    bool has_headers;
    int headers_fd;
    const char *headers_path;
    int64_t headers_off;
    int64_t headers_size;
    uint32_t headers_crc;
    uint32_t n_headers;
    /* object */
    bool is_whole;
    const uint8_t *bitmap; /* little-endian 64-bit words */
    size_t bitmap_bytes;
};

struct pbk_source {
    enum pbk_source_kind kind;
    struct pbk_file file;
    char *label;
    char *name; /* for log lines */
    uint64_t size;
    uint32_t limit;
    enum pbk_compress compress;
    bool is_padded;
    bool is_zlib_8192;
    bool has_headers;
    int headers_fd;
    char *headers_path;
    int64_t headers_off;
    int64_t headers_size;
    uint32_t headers_crc;
    uint32_t n_headers;
    bool is_whole;
    uint64_t *bits;
    size_t n_words;
};

/* 0, -EINVAL for values no source can have, or -ENOMEM. */
int pbk_source_init(struct pbk_source *, const struct pbk_source_spec *spec);
void pbk_source_destroy(struct pbk_file_set *, struct pbk_source *);

static inline bool pbk_source_object_has(const struct pbk_source *source, uint64_t block)
{
    return source->is_whole || block >= source->limit ||
           (block / 64 < source->n_words && (source->bits[block / 64] >> (block % 64) & 1));
}

#endif

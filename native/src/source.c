/* Making and freeing sources: see the header. */
#define _GNU_SOURCE
#include "pbk/source.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>

#include "pbk/bytes.h"
#include "pbk/journal.h"

static int init_object(struct pbk_source *source, const struct pbk_source_spec *spec)
{
    source->is_whole = spec->is_whole;
    if (spec->is_whole)
        return 0;
    if (spec->bitmap_bytes % 8 != 0 || spec->bitmap_bytes > PBK_MAX_BLOCKS / 8)
        return -EINVAL;
    source->n_words = spec->bitmap_bytes / 8;
    source->bits = calloc(source->n_words ? source->n_words : 1, sizeof(*source->bits));
    if (source->bits == NULL)
        return -ENOMEM;
    for (size_t i = 0; i < source->n_words; i++)
        source->bits[i] = pbk_get_u64(spec->bitmap + i * 8);
    return 0;
}

static int init_pages(struct pbk_source *source, const struct pbk_source_spec *spec)
{
    if (spec->compress < PBK_COMPRESS_NONE || spec->compress > PBK_COMPRESS_PGLZ)
        return -EINVAL;
    source->compress = (enum pbk_compress)spec->compress;
    source->is_padded = spec->is_padded;
    source->is_zlib_8192 = spec->is_zlib_8192;
    source->has_headers = spec->has_headers;
    if (!spec->has_headers)
        return 0;
    source->headers_fd = spec->headers_fd;
    source->headers_off = spec->headers_off;
    source->headers_size = spec->headers_size;
    source->headers_crc = spec->headers_crc;
    source->n_headers = spec->n_headers;
    source->headers_path = strdup(spec->headers_path);
    return source->headers_path != NULL ? 0 : -ENOMEM;
}

int pbk_source_init(struct pbk_source *source, const struct pbk_source_spec *spec)
{
    memset(source, 0, sizeof(*source));
    source->file.fd = -1;
    source->kind = spec->kind;
    source->size = spec->size;
    source->limit = spec->limit;
    if (spec->size > INT64_MAX)
        return -EINVAL;
    source->label = strdup(spec->label);
    source->name = strdup(spec->path);
    if (source->label == NULL || source->name == NULL)
        return -ENOMEM;
    int err = pbk_file_init(&source->file, spec->dir_fd, spec->path, O_RDONLY);
    if (err == 0 && spec->kind == PBK_SOURCE_OBJECT)
        err = init_object(source, spec);
    if (err == 0 && spec->kind == PBK_SOURCE_PAGES)
        err = init_pages(source, spec);
    return err;
}

void pbk_source_destroy(struct pbk_file_set *set, struct pbk_source *source)
{
    if (source->file.path != NULL)
        pbk_file_destroy(set, &source->file);
    free(source->label);
    free(source->name);
    free(source->headers_path);
    free(source->bits);
    memset(source, 0, sizeof(*source));
    source->file.fd = -1;
}

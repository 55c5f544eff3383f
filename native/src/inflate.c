/* zlib streams through libdeflate (PBK_HAVE_LIBDEFLATE) or zlib. See the header for who may call. */
#include "pbk/inflate.h"

#include <errno.h>
#include <limits.h>
#include <stdlib.h>

#ifdef PBK_HAVE_LIBDEFLATE

#include <libdeflate.h>

struct pbk_inflater {
    struct libdeflate_decompressor *decompressor;
};

struct pbk_inflater *pbk_inflater_new(void)
{
    struct pbk_inflater *inflater = malloc(sizeof(*inflater));
    if (inflater == NULL)
        return NULL;
    inflater->decompressor = libdeflate_alloc_decompressor();
    if (inflater->decompressor == NULL) {
        free(inflater);
        return NULL;
    }
    return inflater;
}

void pbk_inflater_free(struct pbk_inflater *inflater)
{
    if (inflater == NULL)
        return;
    libdeflate_free_decompressor(inflater->decompressor);
    free(inflater);
}

int pbk_inflate(struct pbk_inflater *inflater, const uint8_t *src, size_t n, uint8_t *dst, size_t dst_n)
{
    size_t used;
    /* Without a place for the output's length libdeflate itself insists on dst_n bytes. */
    enum libdeflate_result result =
        libdeflate_zlib_decompress_ex(inflater->decompressor, src, n, dst, dst_n, &used, NULL);
    return result == LIBDEFLATE_SUCCESS && used == n ? 0 : -EIO;
}

const char *pbk_inflate_library(void)
{
    return "libdeflate";
}

#else

#define ZLIB_CONST
#include <zlib.h>

struct pbk_inflater {
    z_stream stream;
};

struct pbk_inflater *pbk_inflater_new(void)
{
    struct pbk_inflater *inflater = calloc(1, sizeof(*inflater));
    if (inflater == NULL)
        return NULL;
    if (inflateInit(&inflater->stream) != Z_OK) {
        free(inflater);
        return NULL;
    }
    return inflater;
}

void pbk_inflater_free(struct pbk_inflater *inflater)
{
    if (inflater == NULL)
        return;
    inflateEnd(&inflater->stream);
    free(inflater);
}

int pbk_inflate(struct pbk_inflater *inflater, const uint8_t *src, size_t n, uint8_t *dst, size_t dst_n)
{
    z_stream *stream = &inflater->stream;
    if (n > UINT_MAX || dst_n > UINT_MAX || inflateReset(stream) != Z_OK)
        return -EIO;
    stream->next_in = src;
    stream->avail_in = (uInt)n;
    stream->next_out = dst;
    stream->avail_out = (uInt)dst_n;
    return inflate(stream, Z_FINISH) == Z_STREAM_END && stream->avail_in == 0 && stream->avail_out == 0 ? 0 : -EIO;
}

const char *pbk_inflate_library(void)
{
    return "zlib";
}

#endif

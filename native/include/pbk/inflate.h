/*
 * zlib streams, with libdeflate where it was there at build time (half of zlib's CPU for an 8 KiB page), else zlib.
 * One inflater belongs to one thread at a time.
 */
#ifndef PBK_INFLATE_H
#define PBK_INFLATE_H

#include <stddef.h>
#include <stdint.h>

struct pbk_inflater;

struct pbk_inflater *pbk_inflater_new(void); /* NULL: no memory */
void pbk_inflater_free(struct pbk_inflater *);

/* Fills dst exactly from one stream of exactly n bytes: 0, or -EIO if src is anything else than that. */
int pbk_inflate(struct pbk_inflater *, const uint8_t *src, size_t n, uint8_t *dst, size_t dst_n);

/* "libdeflate" or "zlib". */
const char *pbk_inflate_library(void);

#endif

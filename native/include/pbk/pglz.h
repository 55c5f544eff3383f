/* PostgreSQL's own LZ compression, decompression only. Pure; any thread. */
#ifndef PBK_PGLZ_H
#define PBK_PGLZ_H

#include <stddef.h>
#include <stdint.h>

/* Fills dst exactly from exactly n bytes of src: 0, or -EIO if src is anything else than that. */
int pbk_pglz_decompress(const uint8_t *src, size_t n, uint8_t *dst, size_t dst_n);

#endif

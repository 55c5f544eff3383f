/*
 * pglz without a length header, as pg_probackup stores pages.
 *
 * Source: PostgreSQL src/common/pg_lzcompress.c, pglz_decompress(), by its description: a control byte, then eight items,
 * lowest bit first; bit 0 a literal, bit 1 a match of 3..273 bytes from 1..4095 bytes back, copied byte by byte.
 */
#include "pbk/pglz.h"

#include <errno.h>
#include <string.h>

int pbk_pglz_decompress(const uint8_t *src, size_t n, uint8_t *dst, size_t dst_n)
{
    size_t in = 0;
    size_t out = 0;

    while (in < n && out < dst_n) {
        unsigned control = src[in++];
        for (int item = 0; item < 8 && in < n && out < dst_n; item++, control >>= 1) {
            if (!(control & 1)) {
                dst[out++] = src[in++];
                continue;
            }
            if (n - in < 2)
                return -EIO;
            size_t length = (size_t)(src[in] & 0x0F) + 3;
            size_t distance = (size_t)(src[in] & 0xF0) << 4 | src[in + 1];
            in += 2;
            if (length == 18) {
                if (in == n)
                    return -EIO;
                length += src[in++];
            }
            if (distance == 0 || distance > out)
                return -EIO;
            /* The original cuts the last match at the end of the page too. */
            if (length > dst_n - out)
                length = dst_n - out;
            if (distance >= length) {
                memcpy(dst + out, dst + out - distance, length);
                out += length;
            } else {
                for (; length > 0; length--, out++)
                    dst[out] = dst[out - distance];
            }
        }
    }
    return in == n && out == dst_n ? 0 : -EIO;
}

/* CRC-32C (Castagnoli) of bytes in memory. Pure; any thread. */
#ifndef PBK_CRC32C_H
#define PBK_CRC32C_H

#include <stddef.h>
#include <stdint.h>

/* Continues from crc, which is 0 for the first piece: crc32c(b, crc32c(a, 0)) is the checksum of a then b. */
uint32_t pbk_crc32c(uint32_t crc, const void *data, size_t n);

/* The same, one table look-up a byte: the fallback, and the oracle of the fast one. */
uint32_t pbk_crc32c_table(uint32_t crc, const void *data, size_t n);

#endif

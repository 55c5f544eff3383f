/* Little-endian integers in byte buffers, wherever they lie. Pure; any thread. */
#ifndef PBK_BYTES_H
#define PBK_BYTES_H

#include <stdint.h>

static inline uint32_t pbk_get_u32(const uint8_t *p)
{
    return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

static inline uint64_t pbk_get_u64(const uint8_t *p)
{
    return (uint64_t)pbk_get_u32(p) | (uint64_t)pbk_get_u32(p + 4) << 32;
}

static inline void pbk_put_u32(uint8_t *p, uint32_t v)
{
    p[0] = (uint8_t)v;
    p[1] = (uint8_t)(v >> 8);
    p[2] = (uint8_t)(v >> 16);
    p[3] = (uint8_t)(v >> 24);
}

static inline void pbk_put_u64(uint8_t *p, uint64_t v)
{
    pbk_put_u32(p, (uint32_t)v);
    pbk_put_u32(p + 4, (uint32_t)(v >> 32));
}

#endif

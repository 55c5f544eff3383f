/* PostgreSQL's page checksum, 32 sums side by side: see the header. */
#include "pbk/checksum.h"

#include <string.h>

#include "pbk/node.h"

#define N_SUMS 32u
#define N_ROUNDS (PBK_BLCKSZ / 4 / N_SUMS)
#define FNV_PRIME 16777619u

/* The loops are worth vectors, which gcc makes at -O2 only from release 12 on, and not of these. */
#if defined(__GNUC__) && !defined(__clang__)
#define VECTORS optimize("O3")
#else
#define VECTORS unused
#endif

static const uint32_t offsets[N_SUMS] = {
    0x5B1F36E9u, 0xB8525960u, 0x02AB50AAu, 0x1DE66D2Au, 0x79FF467Au, 0x9BB9F8A3u, 0x217E7CD2u, 0x83E13D2Cu,
    0xF8D4474Fu, 0xE39EB970u, 0x42C6AE16u, 0x993216FAu, 0x7B093B5Du, 0x98DAFF3Cu, 0xF718902Au, 0x0B1C9CDBu,
    0xE58F764Bu, 0x187636BCu, 0x5D7B3BB1u, 0xE73DE7DEu, 0x92BEC979u, 0xCCA6C0B2u, 0x304A0979u, 0x85AA43D4u,
    0x783125BBu, 0x6CA8EAA2u, 0xE407EAC6u, 0x4B5CFC3Eu, 0x9FBF8C76u, 0x15CA20BEu, 0xF2CA9FD3u, 0x959BD756u,
};

static inline uint32_t mix(uint32_t sum, uint32_t word)
{
    uint32_t mixed = sum ^ word;
    return (mixed * FNV_PRIME) ^ (mixed >> 17);
}

static inline __attribute__((always_inline)) uint32_t sum_page(const uint8_t *page)
{
    uint32_t sums[N_SUMS];
    uint32_t words[N_SUMS];
    uint32_t result = 0;
    memcpy(sums, offsets, sizeof(sums));
    for (unsigned round = 0; round < N_ROUNDS; round++) {
        memcpy(words, page + (size_t)round * sizeof(words), sizeof(words));
        if (round == 0)
            words[2] &= 0xFFFF0000u; /* pd_checksum itself counts as zero */
        for (unsigned i = 0; i < N_SUMS; i++)
            sums[i] = mix(sums[i], words[i]);
    }
    for (unsigned i = 0; i < N_SUMS; i++)
        result ^= mix(mix(sums[i], 0), 0);
    return result;
}

#if defined(__x86_64__)
__attribute__((target("avx2"), VECTORS)) static uint32_t sum_page_avx2(const uint8_t *page)
{
    return sum_page(page);
}
#endif

__attribute__((VECTORS)) static uint32_t sum_page_plain(const uint8_t *page)
{
    return sum_page(page);
}

uint16_t pbk_page_checksum(const uint8_t *page, uint32_t blkno)
{
    uint32_t sum;
#if defined(__x86_64__)
    /* At every call and not through an ifunc: see crc32c.c. */
    if (__builtin_cpu_supports("avx2"))
        sum = sum_page_avx2(page);
    else
#endif
        sum = sum_page_plain(page);
    return (uint16_t)((sum ^ blkno) % 65535 + 1);
}

static bool is_zero(const uint8_t *page)
{
    return page[0] == 0 && memcmp(page, page + 1, PBK_BLCKSZ - 1) == 0;
}

const char *pbk_page_complaint(const uint8_t *page, uint32_t blkno, bool has_checksum)
{
    unsigned flags = page[10] | (unsigned)page[11] << 8;
    unsigned lower = page[12] | (unsigned)page[13] << 8;
    unsigned upper = page[14] | (unsigned)page[15] << 8;
    unsigned special = page[16] | (unsigned)page[17] << 8;

    if (upper == 0)
        return is_zero(page) ? NULL : "page is neither new nor in use";
    if (has_checksum && pbk_page_checksum(page, blkno) != (page[8] | (unsigned)page[9] << 8))
        return "page has a wrong checksum";
    if ((flags & ~7u) != 0 || lower > upper || upper > special || special > PBK_BLCKSZ || special % 8 != 0)
        return "page has an impossible header";
    return NULL;
}

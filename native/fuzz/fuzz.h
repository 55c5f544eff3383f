/*
 * What the fuzz targets share. Each is one file with LLVMFuzzerTestOneInput, a corpus of its name below corpus/, and is run by
 * run.sh. A target checks more than that nothing crashes: what the code promises of a result that it calls good.
 */
#ifndef PBK_FUZZ_H
#define PBK_FUZZ_H

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../tests/check.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);

/* The rest of the input. Whatever is read behind its end is zeros. */
struct input {
    const uint8_t *data;
    size_t n;
};

static inline uint8_t take_u8(struct input *in)
{
    if (in->n == 0)
        return 0;
    in->n--;
    return *in->data++;
}

static inline uint16_t take_u16(struct input *in)
{
    uint8_t low = take_u8(in);
    return (uint16_t)(low | take_u8(in) << 8);
}

static inline uint32_t take_u32(struct input *in)
{
    uint16_t low = take_u16(in);
    return low | (uint32_t)take_u16(in) << 16;
}

/* At most n bytes, as an allocation of just that size, so that AddressSanitizer sees a read of one byte more. */
static inline uint8_t *take_copy(struct input *in, size_t *n)
{
    if (*n > in->n)
        *n = in->n;
    uint8_t *copy = malloc(*n ? *n : 1);
    CHECK(copy != NULL);
    memcpy(copy, in->data, *n);
    in->data += *n;
    in->n -= *n;
    return copy;
}

#endif

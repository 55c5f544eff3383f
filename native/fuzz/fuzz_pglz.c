/* pglz: the first two bytes are the length of the result. */
#include <errno.h>

#include "fuzz.h"
#include "pbk/pglz.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    struct input in = {data, n};
    size_t wanted = take_u16(&in);
    size_t packed_n = in.n;
    uint8_t *packed = take_copy(&in, &packed_n);
    uint8_t *page = malloc(wanted ? wanted : 1);
    CHECK(page != NULL);
    int err = pbk_pglz_decompress(packed, packed_n, page, wanted);
    CHECK(err == 0 || err == -EIO);
    free(page);
    free(packed);
    return 0;
}

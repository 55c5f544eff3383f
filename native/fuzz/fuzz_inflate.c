/* zlib streams: the first two bytes are the length of the result. What is called good has to be what zlib makes of it. */
#include <errno.h>
#include <zlib.h>

#include "fuzz.h"
#include "pbk/inflate.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    struct input in = {data, n};
    size_t wanted = take_u16(&in);
    size_t packed_n = in.n;
    uint8_t *packed = take_copy(&in, &packed_n);
    uint8_t *page = malloc(wanted ? wanted : 1);
    uint8_t *oracle = malloc(wanted ? wanted : 1);
    struct pbk_inflater *inflater = pbk_inflater_new();
    CHECK(page != NULL && oracle != NULL && inflater != NULL);
    int err = pbk_inflate(inflater, packed, packed_n, page, wanted);
    CHECK(err == 0 || err == -EIO);
    if (err == 0) {
        uLongf made = wanted;
        uLong used = packed_n;
        CHECK(uncompress2(oracle, &made, packed, &used) == Z_OK && made == wanted && used == packed_n);
        CHECK(memcmp(oracle, page, wanted) == 0);
    }
    pbk_inflater_free(inflater);
    free(oracle);
    free(page);
    free(packed);
    return 0;
}

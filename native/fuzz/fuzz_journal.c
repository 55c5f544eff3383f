/*
 * A journal's scan. The first byte says whether the input is the file behind its header, or payloads, each with two bytes of
 * length before it, which get their frames here; and whether the block numbers of these are left as large as they are.
 */
#define _GNU_SOURCE
#include <errno.h>

#include "fuzz_file.h"
#include "pbk/bytes.h"
#include "pbk/crc32c.h"
#include "pbk/journal.h"

static int check_name(void *arg, const uint8_t *payload, size_t n)
{
    (void)arg;
    CHECK(n >= 1 && payload[0] >= PBK_RECORD_FIRST_NAME);
    return 0;
}

static void check_bits(const struct pbk_bits *bits, uint32_t limit)
{
    for (size_t i = limit / 64; i < bits->n_words; i++)
        CHECK((i == limit / 64 ? bits->words[i] >> limit % 64 : bits->words[i]) == 0);
}

/* Large numbers are believed, and cost time and memory that is better spent on other inputs. */
static void shrink_ranges(uint8_t *payload, size_t n)
{
    for (size_t at = 13; n >= 13 && at + 4 <= n && payload[0] < PBK_RECORD_FIRST_NAME; at += 4)
        payload[at + 2] = payload[at + 3] = 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    static const uint8_t session[16] = {7};
    struct input in = {data, n};
    uint8_t flags = take_u8(&in);
    size_t room = PBK_JOURNAL_HEADER + in.n * 9;
    uint8_t *file = calloc(1, room);
    CHECK(file != NULL);
    memcpy(file, "PBKFSJNL\1", 9);
    size_t length = PBK_JOURNAL_HEADER;
    if (flags & 1) {
        memcpy(file + length, in.data, in.n);
        length += in.n;
    } else {
        while (in.n > 2) {
            size_t payload_n = take_u16(&in);
            if (payload_n > in.n)
                payload_n = in.n;
            uint8_t *frame = file + length;
            pbk_put_u32(frame + 4, (uint32_t)payload_n);
            memcpy(frame + 8, in.data, payload_n);
            if (!(flags & 2))
                shrink_ranges(frame + 8, payload_n);
            pbk_put_u32(frame, pbk_crc32c(0, frame + 4, payload_n + 4));
            in.data += payload_n;
            in.n -= payload_n;
            length += 8 + payload_n;
        }
    }
    CHECK(length <= room);
    int fd = make_memory_file(file, length);
    struct pbk_journal_scan scan;
    int err = pbk_journal_scan(fd, session, check_name, NULL, &scan);
    CHECK(err == 0 || (err == -EIO && scan.reason != NULL) || err == -ENOMEM);
    if (err == 0) {
        CHECK(scan.end >= PBK_JOURNAL_HEADER && scan.end <= length);
        for (size_t i = 0; i < scan.n_maps; i++) {
            check_bits(&scan.maps[i].changed, scan.maps[i].limit);
            check_bits(&scan.maps[i].hydrated, scan.maps[i].limit);
        }
    }
    pbk_journal_scan_free(&scan);
    close(fd);
    free(file);
    return 0;
}

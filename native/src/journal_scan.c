/* Reading a journal back, at a mount: see the header. One thread; nothing else has the file open for writing. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "pbk/bytes.h"
#include "pbk/crc32c.h"
#include "pbk/io.h"
#include "pbk/journal.h"
#include "pbk/node.h"

#define MAGIC "PBKFSJNL"
#define VERSION 1u
#define FRAME_HEAD 8u
#define FIRST_BUFFER (256u * 1024u)

/* The file's bytes [start, start + n) in memory, moved forward as the scan goes. */
struct scan_buffer {
    int fd;
    uint8_t *bytes;
    size_t room;
    size_t n;
    uint64_t start;
};

/* *p: want bytes at pos, or NULL where the file ends before. */
static int buffer_get(struct scan_buffer *b, uint64_t pos, size_t want, const uint8_t **p)
{
    if (pos < b->start || pos + want > b->start + b->n) {
        if (want > b->room) {
            size_t room = b->room ? b->room : FIRST_BUFFER;
            while (room < want)
                room *= 2;
            uint8_t *bytes = realloc(b->bytes, room);
            if (bytes == NULL)
                return -ENOMEM;
            b->bytes = bytes;
            b->room = room;
        }
        ssize_t r = pbk_pread_full(b->fd, b->bytes, b->room, pos);
        if (r < 0)
            return (int)r;
        b->start = pos;
        b->n = (size_t)r;
    }
    *p = want <= b->n - (size_t)(pos - b->start) ? b->bytes + (pos - b->start) : NULL;
    return 0;
}

static uint64_t hash_object(uint64_t object)
{
    object *= 0x9E3779B97F4A7C15u;
    return object ^ object >> 32;
}

static int grow_slots(struct pbk_journal_scan *scan)
{
    size_t n_slots = scan->n_slots ? scan->n_slots * 2 : 256;
    uint32_t *slots = calloc(n_slots, sizeof(*slots));
    if (slots == NULL)
        return -ENOMEM;
    for (size_t i = 0; i < scan->n_maps; i++) {
        size_t slot = hash_object(scan->maps[i].object) & (n_slots - 1);
        while (slots[slot] != 0)
            slot = (slot + 1) & (n_slots - 1);
        slots[slot] = (uint32_t)i + 1;
    }
    free(scan->slots);
    scan->slots = slots;
    scan->n_slots = n_slots;
    return 0;
}

static int find_map(struct pbk_journal_scan *scan, uint64_t object, struct pbk_object_map **map)
{
    if (scan->n_maps * 2 >= scan->n_slots) {
        int err = grow_slots(scan);
        if (err)
            return err;
    }
    size_t slot = hash_object(object) & (scan->n_slots - 1);
    while (scan->slots[slot] != 0) {
        *map = &scan->maps[scan->slots[slot] - 1];
        if ((*map)->object == object)
            return 0;
        slot = (slot + 1) & (scan->n_slots - 1);
    }
    if (scan->n_maps == scan->room_maps) {
        size_t room = scan->room_maps ? scan->room_maps * 2 : 64;
        if (room > UINT32_MAX)
            return -ENOMEM;
        struct pbk_object_map *maps = realloc(scan->maps, room * sizeof(*maps));
        if (maps == NULL)
            return -ENOMEM;
        scan->maps = maps;
        scan->room_maps = room;
    }
    *map = &scan->maps[scan->n_maps++];
    **map = (struct pbk_object_map){.object = object, .limit = PBK_NO_LIMIT};
    scan->slots[slot] = (uint32_t)scan->n_maps;
    return 0;
}

static int grow_bits(struct pbk_bits *bits, uint64_t n_blocks)
{
    size_t n_words = (size_t)(n_blocks + 63) / 64;
    if (n_words <= bits->n_words)
        return 0;
    uint64_t *words = realloc(bits->words, n_words * sizeof(*words));
    if (words == NULL)
        return -ENOMEM;
    memset(words + bits->n_words, 0, (n_words - bits->n_words) * sizeof(*words));
    bits->words = words;
    bits->n_words = n_words;
    return 0;
}

static void free_bits(struct pbk_bits *bits)
{
    free(bits->words);
    *bits = (struct pbk_bits){0};
}

static void set_range(uint64_t *words, uint32_t first, uint32_t count)
{
    uint64_t at = first;
    uint64_t end = at + count;
    while (at < end) {
        uint64_t stop = (at | 63) + 1;
        if (stop > end)
            stop = end;
        uint64_t n = stop - at;
        uint64_t mask = n == 64 ? UINT64_MAX : ((UINT64_C(1) << n) - 1) << (at & 63);
        words[at / 64] |= mask;
        at = stop;
    }
}

/* Blocks at or above the limit come from the object anyway, and a later record could not bring them back below it. */
static void cut_bits(struct pbk_bits *bits, uint32_t limit)
{
    size_t n_words = ((size_t)limit + 63) / 64;
    if (limit == PBK_NO_LIMIT || n_words > bits->n_words)
        return;
    for (size_t i = n_words; i < bits->n_words; i++)
        bits->words[i] = 0;
    if (limit % 64 != 0)
        bits->words[n_words - 1] &= (UINT64_C(1) << (limit % 64)) - 1;
}

static void cut_map(struct pbk_object_map *map)
{
    cut_bits(&map->changed, map->limit);
    cut_bits(&map->hydrated, map->limit);
    cut_bits(&map->touched, map->limit);
}

/* Adds the bits of from, as far as they are in mask (NULL: all). */
static int add_bits(struct pbk_bits *bits, const struct pbk_bits *from, const struct pbk_bits *mask)
{
    size_t n_words = mask != NULL && mask->n_words < from->n_words ? mask->n_words : from->n_words;
    int err = grow_bits(bits, (uint64_t)n_words * 64);
    if (err)
        return err;
    for (size_t i = 0; i < n_words; i++)
        bits->words[i] |= from->words[i] & (mask != NULL ? mask->words[i] : UINT64_MAX);
    return 0;
}

/*
 * A block that a write touched counts as changed if it is in the object, whether or not that write was lost with its session:
 * its new bytes may have reached the disk without their PAGES record.
 */
static int finish_map(struct pbk_object_map *map)
{
    int err = add_bits(&map->changed, &map->touched, map->whole ? NULL : &map->hydrated);
    if (err)
        return err;
    free_bits(&map->touched);
    if (map->whole)
        free_bits(&map->hydrated);
    for (size_t i = 0; i < map->hydrated.n_words && i < map->changed.n_words; i++)
        map->hydrated.words[i] &= ~map->changed.words[i];
    return 0;
}

static int take_ranges(struct pbk_bits *bits, const uint8_t *ranges, uint32_t n_ranges, uint64_t end)
{
    int err = grow_bits(bits, end);
    for (uint32_t i = 0; err == 0 && i < n_ranges; i++)
        set_range(bits->words, pbk_get_u32(ranges + (size_t)i * 8), pbk_get_u32(ranges + (size_t)i * 8 + 4));
    return err;
}

static int take_pages(struct pbk_journal_scan *scan, const uint8_t *payload, size_t n, bool is_this_session)
{
    struct pbk_object_map *map;
    if (n < 13)
        return -EIO;
    uint64_t object = pbk_get_u64(payload + 1);
    uint32_t n_ranges = pbk_get_u32(payload + 9);
    if (n != 13 + (uint64_t)n_ranges * 8)
        return -EIO;
    uint64_t end = 0;
    for (uint32_t i = 0; i < n_ranges; i++) {
        uint64_t first = pbk_get_u32(payload + 13 + (size_t)i * 8);
        uint64_t count = pbk_get_u32(payload + 13 + (size_t)i * 8 + 4);
        if (count == 0 || first + count > PBK_MAX_BLOCKS)
            return -EIO;
        if (first + count > end)
            end = first + count;
    }
    int err = find_map(scan, object, &map);
    if (err)
        return err;
    const uint8_t *ranges = payload + 13;
    map->is_known |= payload[0] != PBK_RECORD_PAGES_LIVE || is_this_session;
    if (payload[0] == PBK_RECORD_HYDRATED) {
        err = take_ranges(&map->hydrated, ranges, n_ranges, end);
    } else {
        if (payload[0] == PBK_RECORD_PAGES || is_this_session)
            err = take_ranges(&map->changed, ranges, n_ranges, end);
        if (err == 0 && payload[0] == PBK_RECORD_PAGES_LIVE)
            err = take_ranges(&map->touched, ranges, n_ranges, end);
    }
    cut_map(map);
    return err;
}

static int take_limit(struct pbk_journal_scan *scan, const uint8_t *payload, size_t n)
{
    struct pbk_object_map *map;
    if (n != 13)
        return -EIO;
    int err = find_map(scan, pbk_get_u64(payload + 1), &map);
    if (err)
        return err;
    map->is_known = true;
    uint32_t limit = pbk_get_u32(payload + 9);
    if (limit < map->limit)
        map->limit = limit;
    cut_map(map);
    return 0;
}

static int take_whole(struct pbk_journal_scan *scan, const uint8_t *payload, size_t n)
{
    struct pbk_object_map *map;
    if (n != 9)
        return -EIO;
    int err = find_map(scan, pbk_get_u64(payload + 1), &map);
    if (err == 0)
        map->whole = map->is_known = true;
    return err;
}

static int check_header(struct scan_buffer *buffer, struct pbk_journal_scan *scan)
{
    const uint8_t *header;
    int err = buffer_get(buffer, 0, PBK_JOURNAL_HEADER, &header);
    if (err)
        return err;
    if (header == NULL || memcmp(header, MAGIC, 8) != 0) {
        scan->reason = "not a journal";
        return -EIO;
    }
    if (pbk_get_u32(header + 8) != VERSION || pbk_get_u32(header + 12) != 0) {
        scan->reason = "journal has another format version";
        return -EIO;
    }
    return 0;
}

int pbk_journal_scan(int fd, const uint8_t session[16], pbk_journal_visit visit, void *arg,
                     struct pbk_journal_scan *scan)
{
    struct scan_buffer buffer = {.fd = fd};
    bool is_this_session = false;
    uint64_t pos = PBK_JOURNAL_HEADER;

    memset(scan, 0, sizeof(*scan));
    int err = check_header(&buffer, scan);
    while (err == 0) {
        const uint8_t *head;
        const uint8_t *payload;
        scan->end = pos;
        err = buffer_get(&buffer, pos, FRAME_HEAD, &head);
        if (err || head == NULL)
            break;
        uint32_t crc = pbk_get_u32(head);
        uint32_t length = pbk_get_u32(head + 4);
        if (length == 0 || length > PBK_JOURNAL_MAX_PAYLOAD)
            break;
        err = buffer_get(&buffer, pos, FRAME_HEAD + length, &head);
        if (err || head == NULL || pbk_crc32c(0, head + 4, 4 + (size_t)length) != crc)
            break;
        payload = head + FRAME_HEAD;
        switch (payload[0]) {
        case PBK_RECORD_SESSION:
            if (length != 17)
                err = -EIO;
            else
                is_this_session = memcmp(payload + 1, session, 16) == 0;
            break;
        case PBK_RECORD_PAGES:
        case PBK_RECORD_PAGES_LIVE:
        case PBK_RECORD_HYDRATED:
            err = take_pages(scan, payload, length, is_this_session);
            break;
        case PBK_RECORD_LIMIT:
            err = take_limit(scan, payload, length);
            break;
        case PBK_RECORD_WHOLE:
            err = take_whole(scan, payload, length);
            break;
        default:
            if (payload[0] < PBK_RECORD_FIRST_NAME)
                err = -EIO;
            else
                err = visit != NULL ? visit(arg, payload, length) : 0;
            break;
        }
        if (err == -EIO && scan->reason == NULL)
            scan->reason = "journal has a record that is not of its format";
        pos += FRAME_HEAD + length;
    }
    free(buffer.bytes);
    for (size_t i = 0; err == 0 && i < scan->n_maps; i++)
        err = finish_map(&scan->maps[i]);
    return err;
}

void pbk_journal_scan_free(struct pbk_journal_scan *scan)
{
    for (size_t i = 0; i < scan->n_maps; i++) {
        free_bits(&scan->maps[i].changed);
        free_bits(&scan->maps[i].hydrated);
        free_bits(&scan->maps[i].touched);
    }
    free(scan->maps);
    free(scan->slots);
    memset(scan, 0, sizeof(*scan));
}

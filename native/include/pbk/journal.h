/*
 * The journal of a diff: an append-only file of checksummed frames. This half appends, makes durable, and scans; what the
 * records of names say is overlay's business. ARCHITECTURE.md, "journal", has the format.
 *
 * pbk_journal_append and pbk_journal_sync: any thread, any time. The lock is the last one in every order.
 */
#ifndef PBK_JOURNAL_H
#define PBK_JOURNAL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define PBK_JOURNAL_HEADER 64u
#define PBK_JOURNAL_MAX_PAYLOAD (16u << 20)

/* Blocks of one object that are believed: 2 TiB, so 32 MiB of bitmap. */
#define PBK_MAX_BLOCKS (1u << 28)

enum pbk_record_type {
    PBK_RECORD_SESSION = 1,
    PBK_RECORD_PAGES = 2,
    PBK_RECORD_PAGES_LIVE = 3,
    PBK_RECORD_LIMIT = 4,
    PBK_RECORD_WHOLE = 5,
    PBK_RECORD_HYDRATED = 6,
    PBK_RECORD_FIRST_NAME = 16,
};

struct pbk_range {
    uint32_t first;
    uint32_t count;
};

struct pbk_journal;

/* fd is the caller's and outlives the journal; frames are appended at end. What lies before end counts as not yet synced. */
struct pbk_journal *pbk_journal_new(int fd, uint64_t end);
void pbk_journal_free(struct pbk_journal *);

/* Appends one frame: 0 or -errno, and then nothing of it is left in the file. *end, if not NULL, is the position behind it. */
int pbk_journal_append(struct pbk_journal *, const void *payload, size_t n, uint64_t *end);

/* A record of type PAGES, PAGES_LIVE or HYDRATED, in as many frames as n needs; one if n is 0. */
int pbk_journal_append_pages(struct pbk_journal *, enum pbk_record_type type, uint64_t object,
                             const struct pbk_range *ranges, size_t n);
int pbk_journal_append_limit(struct pbk_journal *, uint64_t object, uint32_t limit, uint64_t *end);
int pbk_journal_append_whole(struct pbk_journal *, uint64_t object);

/* Returns when everything before position upto is durable. Callers that meet share one fdatasync. A failed one makes the
 * journal refuse all that follows: the kernel would report success the next time without having written. */
int pbk_journal_sync_to(struct pbk_journal *, uint64_t upto);
int pbk_journal_sync(struct pbk_journal *);

uint64_t pbk_journal_end(struct pbk_journal *);
uint64_t pbk_journal_synced(struct pbk_journal *);

/* One bit a block: block b is bit b % 64 of word b / 64. */
struct pbk_bits {
    uint64_t *words;
    size_t n_words;
};

/* What a scan knows of one object; no bits at or above limit. */
struct pbk_object_map {
    uint64_t object;
    struct pbk_bits changed;  /* written: they may differ from what is below */
    struct pbk_bits hydrated; /* in the object too, and as they are below; empty if whole */
    struct pbk_bits touched;  /* private: what PAGES_LIVE records of any session name */
    uint32_t limit;           /* PBK_NO_LIMIT if no record says */
    bool whole;               /* every block is in the object */
    bool is_known;            /* a record counted that says something of it */
};

struct pbk_journal_scan {
    uint64_t end; /* length of the valid prefix */
    struct pbk_object_map *maps;
    size_t n_maps;
    const char *reason; /* what is wrong, where the result is -EIO */
    size_t n_slots;     /* private: hash of the maps, index + 1 */
    uint32_t *slots;
    size_t room_maps;
};

/* Called with the payload of each record of a name, in order; not 0 ends the scan and is its result. */
typedef int (*pbk_journal_visit)(void *arg, const uint8_t *payload, size_t n);

/*
 * Reads the journal from its header to the first frame that does not check. PAGES_LIVE counts only behind a SESSION that names
 * session, so an id of zeros gives what would be left after a power cut; of a block that is in the object anyway, it counts in
 * any case as a sign that the block was changed. 0, or -errno: -EIO for a header or for a frame that
 * checks but can't be meant. Call pbk_journal_scan_free in any case.
 */
int pbk_journal_scan(int fd, const uint8_t session[16], pbk_journal_visit visit, void *arg,
                     struct pbk_journal_scan *scan);
void pbk_journal_scan_free(struct pbk_journal_scan *);

#endif

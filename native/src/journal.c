/* Appending to the journal and making it durable: see the header. */
#define _GNU_SOURCE
#include "pbk/journal.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "pbk/bytes.h"
#include "pbk/crc32c.h"
#include "pbk/io.h"
#include "pbk/step.h"

/* Frames of page records stay well below the limit of the format, so that a scan never needs a large buffer for them. */
#define RANGES_PER_FRAME 65536u
#define PAGES_HEAD 13u

/* Space on the disk behind the end, so that names change and written pages become durable on a full disk, too. */
#define ROOM_BYTES UINT64_C(131072)

struct pbk_journal {
    int fd;
    pthread_mutex_t lock; /* guards what follows */
    pthread_cond_t synced_more;
    uint64_t end;
    uint64_t room_end; /* the disk has space for it up to here */
    uint64_t synced;
    bool is_syncing;
    int failed; /* a negative errno that answers everything from now on */
};

struct pbk_journal *pbk_journal_new(int fd, uint64_t end)
{
    struct pbk_journal *journal = calloc(1, sizeof(*journal));
    if (journal == NULL)
        return NULL;
    journal->fd = fd;
    journal->end = end;
    journal->room_end = end;
    if (pthread_mutex_init(&journal->lock, NULL) != 0) {
        free(journal);
        return NULL;
    }
    if (pthread_cond_init(&journal->synced_more, NULL) != 0) {
        pthread_mutex_destroy(&journal->lock);
        free(journal);
        return NULL;
    }
    return journal;
}

void pbk_journal_free(struct pbk_journal *journal)
{
    if (journal == NULL)
        return;
    pthread_cond_destroy(&journal->synced_more);
    pthread_mutex_destroy(&journal->lock);
    free(journal);
}

static const char *step_of(uint8_t type)
{
    static const char *const labels[] = {
        [PBK_RECORD_SESSION] = "journal:session",       [PBK_RECORD_PAGES] = "journal:pages",
        [PBK_RECORD_PAGES_LIVE] = "journal:pages_live", [PBK_RECORD_LIMIT] = "journal:limit",
        [PBK_RECORD_WHOLE] = "journal:whole",           [PBK_RECORD_HYDRATED] = "journal:hydrated",
    };
    return type < sizeof(labels) / sizeof(labels[0]) && labels[type] != NULL ? labels[type] : "journal:name";
}

/* Where it can't be had, an append will tell. */
static void make_room(struct pbk_journal *journal)
{
    if (journal->room_end >= journal->end + ROOM_BYTES / 2)
        return;
    if (fallocate(journal->fd, FALLOC_FL_KEEP_SIZE, (off_t)journal->end, (off_t)ROOM_BYTES) == 0)
        journal->room_end = journal->end + ROOM_BYTES;
    else if (errno == EOPNOTSUPP)
        journal->room_end = UINT64_MAX; /* the file system does not know how */
}

int pbk_journal_append(struct pbk_journal *journal, const void *payload, size_t n, uint64_t *end)
{
    uint8_t head[8];
    if (n == 0 || n > PBK_JOURNAL_MAX_PAYLOAD)
        return -EINVAL;
    pbk_put_u32(head + 4, (uint32_t)n);
    pbk_put_u32(head, pbk_crc32c(pbk_crc32c(0, head + 4, 4), payload, n));
    struct iovec iov[2] = {
        {.iov_base = head, .iov_len = sizeof(head)},
        {.iov_base = (void *)(uintptr_t)payload, .iov_len = n},
    };

    pthread_mutex_lock(&journal->lock);
    int err = journal->failed;
    if (err == 0) {
        make_room(journal);
        pbk_step(step_of(*(const uint8_t *)payload));
        err = pbk_pwritev_full(journal->fd, iov, 2, journal->end);
        if (err == 0)
            journal->end += sizeof(head) + n;
        else if (pbk_ftruncate(journal->fd, journal->end) != 0)
            /* Part of a frame is left, and the next one could complete it to something that checks. */
            journal->failed = -EIO;
        else
            journal->room_end = journal->end; /* the truncation gave it back */
        if (end != NULL)
            *end = journal->end;
    }
    pthread_mutex_unlock(&journal->lock);
    return err;
}

int pbk_journal_append_pages(struct pbk_journal *journal, enum pbk_record_type type, uint64_t object,
                             const struct pbk_range *ranges, size_t n)
{
    uint8_t small[PAGES_HEAD + 64 * 8];
    do {
        size_t now = n < RANGES_PER_FRAME ? n : RANGES_PER_FRAME;
        uint8_t *frame = small;
        if (now > 64) {
            frame = malloc(PAGES_HEAD + now * 8);
            if (frame == NULL)
                return -ENOMEM;
        }
        frame[0] = (uint8_t)type;
        pbk_put_u64(frame + 1, object);
        pbk_put_u32(frame + 9, (uint32_t)now);
        for (size_t i = 0; i < now; i++) {
            pbk_put_u32(frame + PAGES_HEAD + i * 8, ranges[i].first);
            pbk_put_u32(frame + PAGES_HEAD + i * 8 + 4, ranges[i].count);
        }
        int err = pbk_journal_append(journal, frame, PAGES_HEAD + now * 8, NULL);
        if (frame != small)
            free(frame);
        if (err)
            return err;
        ranges += now;
        n -= now;
    } while (n > 0);
    return 0;
}

int pbk_journal_append_limit(struct pbk_journal *journal, uint64_t object, uint32_t limit, uint64_t *end)
{
    uint8_t payload[13] = {PBK_RECORD_LIMIT};
    pbk_put_u64(payload + 1, object);
    pbk_put_u32(payload + 9, limit);
    return pbk_journal_append(journal, payload, sizeof(payload), end);
}

int pbk_journal_append_whole(struct pbk_journal *journal, uint64_t object)
{
    uint8_t payload[9] = {PBK_RECORD_WHOLE};
    pbk_put_u64(payload + 1, object);
    return pbk_journal_append(journal, payload, sizeof(payload), NULL);
}

int pbk_journal_sync_to(struct pbk_journal *journal, uint64_t upto)
{
    pthread_mutex_lock(&journal->lock);
    while (journal->failed == 0 && journal->synced < upto) {
        if (journal->is_syncing) {
            pthread_cond_wait(&journal->synced_more, &journal->lock);
            continue;
        }
        uint64_t end = journal->end;
        journal->is_syncing = true;
        pthread_mutex_unlock(&journal->lock);
        pbk_step("journal:fdatasync");
        int err = pbk_fdatasync(journal->fd);
        pbk_step("journal:synced");
        pthread_mutex_lock(&journal->lock);
        journal->is_syncing = false;
        if (err == 0)
            journal->synced = end;
        else
            journal->failed = err;
        pthread_cond_broadcast(&journal->synced_more);
    }
    int err = journal->failed;
    pthread_mutex_unlock(&journal->lock);
    return err;
}

int pbk_journal_sync(struct pbk_journal *journal)
{
    return pbk_journal_sync_to(journal, pbk_journal_end(journal));
}

uint64_t pbk_journal_end(struct pbk_journal *journal)
{
    pthread_mutex_lock(&journal->lock);
    uint64_t end = journal->end;
    pthread_mutex_unlock(&journal->lock);
    return end;
}

uint64_t pbk_journal_synced(struct pbk_journal *journal)
{
    pthread_mutex_lock(&journal->lock);
    uint64_t synced = journal->synced;
    pthread_mutex_unlock(&journal->lock);
    return synced;
}

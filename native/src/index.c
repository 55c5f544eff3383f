/* Building, keeping and dropping page indexes: see the header. */
#define _GNU_SOURCE
#include "pbk/index.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "pbk/io.h"
#include "pbk/node.h"
#include "pbk/pagestream.h"

/* For how long what a layer says is believed that could not be read. */
#define RETRY_S 2

struct builder {
    struct pbk_index *index;
    uint32_t room;     /* entries allocated */
    uint32_t n_blocks; /* the file has no more */
    uint32_t limit;    /* of the layer at hand, over all newer ones */
    uint32_t end;      /* behind the newest good record of the layer at hand */
    unsigned source;
};

static int grow_entries(struct builder *b, uint32_t block)
{
    uint32_t room = b->room ? b->room : 64;
    while (room <= block)
        room *= 2;
    if (room > b->n_blocks)
        room = b->n_blocks;
    uint64_t *entries = realloc(b->index->entries, room * sizeof(*entries));
    if (entries == NULL)
        return -ENOMEM;
    memset(entries + b->room, 0, (room - b->room) * sizeof(*entries));
    b->index->entries = entries;
    b->room = room;
    return 0;
}

static int add_record(void *arg, const struct pbk_page_record *record)
{
    struct builder *b = arg;
    b->end = record->block + 1;
    if (record->block >= b->limit)
        return 0;
    if (record->block >= b->room) {
        int err = grow_entries(b, record->block);
        if (err)
            return err;
    }
    uint64_t *entry = &b->index->entries[record->block];
    if (*entry == 0)
        *entry = record->pos | (uint64_t)record->length << 32 | (uint64_t)b->source << 48;
    if (record->block >= b->index->n_entries)
        b->index->n_entries = record->block + 1;
    return 0;
}

/* Lack of memory or descriptors says nothing about the layer: the read fails, and the next one tries again. */
static bool is_transient(int err)
{
    return err == -ENOMEM || err == -EMFILE || err == -ENFILE || err == -EAGAIN;
}

static int walk_source(struct pbk_source *source, struct pbk_file_set *files, struct pbk_inflater *inflater,
                       struct builder *b, struct pbk_page_walk *walk)
{
    int fd;
    int err;
    memset(walk, 0, sizeof(*walk));
    if (source->has_headers) {
        /* One map serves all files of its backup and is read once for each: not worth a descriptor. */
        unsigned n_tries = 0;
        do
            fd = pbk_open_beneath(source->headers_fd, source->headers_path, O_RDONLY);
        while (fd < 0 && pbk_file_set_relieve(files, fd, &n_tries));
        if (fd < 0) {
            walk->reason = "header map can't be opened";
            return fd;
        }
        err = pbk_headermap_walk(fd, source->headers_off, source->headers_size, source->headers_crc, source->n_headers,
                                 source->size, inflater, add_record, b, walk);
        close(fd);
        return err;
    }
    fd = pbk_file_acquire(files, &source->file);
    if (fd < 0) {
        walk->reason = "stored file can't be opened";
        return fd;
    }
    err = pbk_pages_walk(fd, source->size, source->is_padded, add_record, b, walk);
    pbk_file_release(files, &source->file);
    return err;
}

static time_t now_s(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec;
}

bool pbk_index_is_stale(const struct pbk_index *index)
{
    return index->stale_at_s != 0 && now_s() >= index->stale_at_s;
}

static void free_index(struct pbk_index *index)
{
    if (index == NULL)
        return;
    free(index->entries);
    free(index->damages);
    free(index);
}

int pbk_index_build(struct pbk_source *sources, unsigned first_source, unsigned n_sources, uint32_t n_blocks,
                    struct pbk_file_set *files, struct pbk_inflater *inflater, struct pbk_log *log,
                    struct pbk_index **result)
{
    struct builder b = {.n_blocks = n_blocks, .limit = n_blocks};
    int err = 0;

    b.index = calloc(1, sizeof(*b.index));
    if (b.index == NULL)
        return -ENOMEM;
    for (unsigned i = first_source; i < n_sources && b.limit > 0; i++) {
        struct pbk_source *source = &sources[i];
        struct pbk_page_walk walk;
        if (source->limit < b.limit)
            b.limit = source->limit;
        b.source = i;
        b.end = 0;
        err = walk_source(source, files, inflater, &b, &walk);
        if (is_transient(err))
            goto fail;
        if (err) {
            pbk_log_failure(log, source->name, PBK_LOG_NO_BLOCK, source->label,
                            walk.reason != NULL ? walk.reason : "stored pages can't be listed",
                            err == -EBADMSG ? 0 : -err);
            /* The store may come back; what is malformed stays so. */
            if (err != -EBADMSG)
                b.index->stale_at_s = now_s() + RETRY_S;
            if (b.end < b.limit) {
                size_t n = (size_t)b.index->n_damages + 1;
                struct pbk_index_damage *damages = realloc(b.index->damages, n * sizeof(*damages));
                if (damages == NULL) {
                    err = -ENOMEM;
                    goto fail;
                }
                damages[n - 1] = (struct pbk_index_damage){.first = b.end, .end = b.limit, .source = i};
                b.index->damages = damages;
                b.index->n_damages = (unsigned)n;
                b.limit = b.end;
            }
        } else if (walk.has_marker && walk.marker < b.limit) {
            b.limit = walk.marker;
        }
    }
    if (b.room > b.index->n_entries && b.index->n_entries > 0) {
        uint64_t *entries = realloc(b.index->entries, b.index->n_entries * sizeof(*entries));
        if (entries != NULL)
            b.index->entries = entries;
    }
    b.index->bytes = sizeof(*b.index) + b.index->n_entries * sizeof(*b.index->entries) +
                     b.index->n_damages * sizeof(*b.index->damages);
    *result = b.index;
    return 0;
fail:
    free_index(b.index);
    return err;
}

uint64_t pbk_index_lookup(const struct pbk_index *index, uint32_t block, unsigned *source)
{
    uint64_t entry = block < index->n_entries ? index->entries[block] : 0;
    if (entry != 0) {
        *source = pbk_index_source(entry);
        return entry;
    }
    for (unsigned i = 0; i < index->n_damages; i++) {
        if (block >= index->damages[i].first && block < index->damages[i].end) {
            *source = index->damages[i].source;
            return PBK_INDEX_DAMAGED;
        }
    }
    return 0;
}

int pbk_index_set_init(struct pbk_index_set *set, size_t max_bytes)
{
    memset(set, 0, sizeof(*set));
    set->max_bytes = max_bytes;
    return -pthread_mutex_init(&set->lock, NULL);
}

void pbk_index_set_destroy(struct pbk_index_set *set)
{
    pthread_mutex_destroy(&set->lock);
}

static void unlink_index(struct pbk_index_set *set, struct pbk_index *index)
{
    if (index->newer != NULL)
        index->newer->older = index->older;
    else
        set->newest = index->older;
    if (index->older != NULL)
        index->older->newer = index->newer;
    else
        set->oldest = index->newer;
    index->newer = index->older = NULL;
}

static void link_newest(struct pbk_index_set *set, struct pbk_index *index)
{
    index->newer = NULL;
    index->older = set->newest;
    if (set->newest != NULL)
        set->newest->newer = index;
    else
        set->oldest = index;
    set->newest = index;
}

/* Takes an index out of the set. If nobody reads it, it goes to *garbage, to be freed without the lock. */
static void drop_locked(struct pbk_index_set *set, struct pbk_index *index, struct pbk_index **garbage)
{
    unlink_index(set, index);
    *index->owner = NULL;
    index->owner = NULL;
    set->bytes -= index->bytes;
    if (--index->n_refs == 0) {
        index->older = *garbage;
        *garbage = index;
    }
}

static void free_garbage(struct pbk_index *garbage)
{
    while (garbage != NULL) {
        struct pbk_index *next = garbage->older;
        free_index(garbage);
        garbage = next;
    }
}

struct pbk_index *pbk_index_get(struct pbk_index_set *set, struct pbk_index **owner)
{
    pthread_mutex_lock(&set->lock);
    struct pbk_index *index = *owner;
    if (index != NULL) {
        index->n_refs++;
        if (set->newest != index) {
            unlink_index(set, index);
            link_newest(set, index);
        }
    }
    pthread_mutex_unlock(&set->lock);
    return index;
}

void pbk_index_publish(struct pbk_index_set *set, struct pbk_index **owner, struct pbk_index *index)
{
    struct pbk_index *garbage = NULL;
    pthread_mutex_lock(&set->lock);
    index->owner = owner;
    index->n_refs = 2; /* the set's and the caller's */
    *owner = index;
    link_newest(set, index);
    set->bytes += index->bytes;
    while (set->bytes > set->max_bytes && set->oldest != index)
        drop_locked(set, set->oldest, &garbage);
    pthread_mutex_unlock(&set->lock);
    free_garbage(garbage);
}

void pbk_index_put(struct pbk_index_set *set, struct pbk_index *index)
{
    pthread_mutex_lock(&set->lock);
    bool is_last = --index->n_refs == 0;
    pthread_mutex_unlock(&set->lock);
    if (is_last)
        free_index(index);
}

void pbk_index_demote(struct pbk_index_set *set, struct pbk_index **owner)
{
    pthread_mutex_lock(&set->lock);
    struct pbk_index *index = *owner;
    if (index != NULL && set->oldest != index) {
        unlink_index(set, index);
        index->older = NULL;
        index->newer = set->oldest;
        set->oldest->older = index;
        set->oldest = index;
    }
    pthread_mutex_unlock(&set->lock);
}

size_t pbk_index_drop(struct pbk_index_set *set, struct pbk_index **owner)
{
    struct pbk_index *garbage = NULL;
    size_t bytes = 0;
    pthread_mutex_lock(&set->lock);
    if (*owner != NULL) {
        bytes = (*owner)->bytes;
        drop_locked(set, *owner, &garbage);
    }
    pthread_mutex_unlock(&set->lock);
    free_garbage(garbage);
    return bytes;
}

size_t pbk_index_drop_all(struct pbk_index_set *set)
{
    struct pbk_index *garbage = NULL;
    pthread_mutex_lock(&set->lock);
    size_t bytes = set->bytes;
    while (set->oldest != NULL)
        drop_locked(set, set->oldest, &garbage);
    pthread_mutex_unlock(&set->lock);
    free_garbage(garbage);
    return bytes;
}

size_t pbk_index_bytes(struct pbk_index_set *set)
{
    pthread_mutex_lock(&set->lock);
    size_t bytes = set->bytes;
    pthread_mutex_unlock(&set->lock);
    return bytes;
}

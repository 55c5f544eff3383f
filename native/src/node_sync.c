/*
 * Making an object durable: first its data, then the record of its new blocks, then (the caller) the journal. So a block that
 * the journal calls durable is, and one that did not get that far reads as its version below after a power cut.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "node_private.h"
#include "pbk/io.h"
#include "pbk/step.h"

struct range_list {
    struct pbk_range *ranges;
    size_t n;
    size_t room;
};

static int list_add(struct range_list *list, uint32_t block)
{
    if (list->n > 0) {
        struct pbk_range *last = &list->ranges[list->n - 1];
        if (last->first + last->count == block) {
            last->count++;
            return 0;
        }
    }
    if (list->n == list->room) {
        size_t room = list->room ? list->room * 2 : 64;
        struct pbk_range *ranges = realloc(list->ranges, room * sizeof(*ranges));
        if (ranges == NULL)
            return -ENOMEM;
        list->ranges = ranges;
        list->room = room;
    }
    list->ranges[list->n++] = (struct pbk_range){.first = block, .count = 1};
    return 0;
}

static int list_word(struct range_list *list, size_t i, uint64_t word, uint32_t limit)
{
    for (; word != 0; word &= word - 1) {
        uint64_t block = i * 64 + (uint64_t)__builtin_ctzll(word);
        if (block >= limit)
            break;
        int err = list_add(list, (uint32_t)block);
        if (err)
            return err;
    }
    return 0;
}

/* The blocks that are in the object but not yet recorded, as of now: those that were changed, and those that are as below. */
static int list_new_blocks(struct pbk_object *object, struct range_list *changed, struct range_list *hydrated)
{
    int err = 0;
    for (size_t i = 0; err == 0 && i < object->n_words && i * 64 < object->limit; i++) {
        uint64_t has_changed = atomic_load_explicit(&object->changed[i], memory_order_acquire);
        uint64_t is_present = atomic_load_explicit(&object->present[i], memory_order_acquire);
        err = list_word(changed, i, has_changed & ~object->recorded[i], object->limit);
        if (err == 0)
            err = list_word(hydrated, i, is_present & ~has_changed & ~object->durable[i], object->limit);
    }
    return err;
}

static void set_blocks(uint64_t *words, const struct range_list *list)
{
    for (size_t i = 0; i < list->n; i++) {
        for (uint32_t k = 0; k < list->ranges[i].count; k++) {
            uint32_t block = list->ranges[i].first + k;
            words[block / 64] |= UINT64_C(1) << (block % 64);
        }
    }
}

static int sync_directory(struct pbk_node *node)
{
    char name[4];
    snprintf(name, sizeof(name), "%02x", (unsigned)(node->object->id & 255));
    unsigned n_tries = 0;
    int fd;
    int err = 0;
    do {
        fd = openat(node->object->store.objects_fd, name, O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW);
        err = fd < 0 ? -errno : 0;
    } while (err && pbk_file_set_relieve(&node->nodes->files, err, &n_tries));
    if (err)
        return err;
    pbk_step("object:directory:fsync");
    err = pbk_fsync(fd);
    close(fd);
    return err;
}

static int sync_data(struct pbk_node *node, bool datasync)
{
    struct pbk_object *object = node->object;
    int fd = pbk_file_acquire(&node->nodes->files, &object->file);
    if (fd < 0)
        return fd;
    pbk_step("object:fsync");
    /* Held open, so that nobody closes the file unsynced because it is called clean. What is written from here on makes it
     * dirty again. After a failure blocks would be recorded as durable that are not: the object stays unsyncable until it is
     * mounted again. */
    atomic_store(&object->file.is_dirty, false);
    int err = pbk_file_sync(&node->nodes->files, &object->file, fd, datasync);
    pbk_file_release(&node->nodes->files, &object->file);
    return err;
}

int node_sync_object(struct pbk_node *node, bool datasync)
{
    struct pbk_object *object = node->object;
    struct pbk_journal *journal = object->store.journal;
    struct range_list changed = {0};
    struct range_list hydrated = {0};
    int err = atomic_load(&object->file.sync_error);
    if (err)
        return err;
    err = list_new_blocks(object, &changed, &hydrated);
    if (err)
        goto out;
    if (atomic_load(&object->file.is_dirty) || changed.n > 0 || hydrated.n > 0 || object->is_fresh || !datasync)
        err = sync_data(node, datasync);
    if (err == 0 && object->is_fresh) {
        err = sync_directory(node);
        if (err == 0)
            object->is_fresh = false;
    }
    if (err)
        goto out;
    if (journal != NULL && changed.n > 0)
        err = pbk_journal_append_pages(journal, PBK_RECORD_PAGES, object->id, changed.ranges, changed.n);
    if (err)
        goto out;
    set_blocks(object->recorded, &changed);
    set_blocks(object->durable, &changed);
    count(&node->nodes->counters.page_records, changed.n);
    if (journal != NULL && hydrated.n > 0)
        err = pbk_journal_append_pages(journal, PBK_RECORD_HYDRATED, object->id, hydrated.ranges, hydrated.n);
    if (err)
        goto out;
    set_blocks(object->durable, &hydrated);
    if (journal != NULL && object->is_mapped && object->limit < object->recorded_limit) {
        err = pbk_journal_append_limit(journal, object->id, object->limit, &object->settled_end);
        if (err)
            goto out;
        object->recorded_limit = object->limit;
    }
out:
    if (err)
        atomic_store(&object->file.is_dirty, true);
    free(changed.ranges);
    free(hydrated.ranges);
    return err;
}

/* Not to be taken for done before it has succeeded once. sync_lock held. */
static int record_truncate(struct pbk_node *node)
{
    struct pbk_object *object = node->object;
    object->is_unrecorded = true;
    int err = node_sync_object(node, true);
    if (err)
        return err;
    object->is_unrecorded = false;
    if (object->store.journal != NULL)
        object->settled_end = pbk_journal_end(object->store.journal);
    return 0;
}

int node_record_truncate(struct pbk_node *node)
{
    struct pbk_object *object = node->object;
    pthread_mutex_lock(&object->sync_lock);
    atomic_store(&object->is_unsettled, true);
    int err = record_truncate(node);
    pthread_mutex_unlock(&object->sync_lock);
    return err;
}

int node_settle(struct pbk_node *node)
{
    struct pbk_object *object = node->object;
    struct pbk_journal *journal = object->store.journal;
    int err = 0;
    if (!atomic_load(&object->is_unsettled))
        return 0;
    pthread_mutex_lock(&object->sync_lock);
    if (atomic_load(&object->is_unsettled)) {
        if (object->is_unrecorded)
            err = record_truncate(node);
        if (err == 0 && journal != NULL)
            err = pbk_journal_sync_to(journal, object->settled_end);
        if (err == 0)
            atomic_store(&object->is_unsettled, false);
    }
    pthread_mutex_unlock(&object->sync_lock);
    return err;
}

int pbk_node_fsync(struct pbk_node *node, bool datasync)
{
    struct pbk_nodes *nodes = node->nodes;
    int err = 0;
    count(&nodes->counters.fsyncs, 1);
    pthread_rwlock_rdlock(&node->lock);
    struct pbk_journal *journal = node_store(nodes).journal;
    if (node->object != NULL) {
        pthread_mutex_lock(&node->object->sync_lock);
        err = node_sync_object(node, datasync);
        pthread_mutex_unlock(&node->object->sync_lock);
    }
    pthread_rwlock_unlock(&node->lock);
    if (err == 0 && journal != NULL)
        err = pbk_journal_sync(journal);
    return err;
}

int pbk_node_sync_error(struct pbk_node *node)
{
    pthread_rwlock_rdlock(&node->lock);
    int err = node->object != NULL ? atomic_load(&node->object->file.sync_error) : 0;
    pthread_rwlock_unlock(&node->lock);
    return err;
}

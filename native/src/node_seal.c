/*
 * Sealing: the object of each node becomes the newest of its immutable sources, in place, while readers go on.
 *
 * The gate is closed all the time, so no object changes and no write is under way. Memory is taken first, for all nodes, and
 * then nothing can fail any more. A write that waited at the gate finds no object and asks for a copy-up, as a first write
 * does.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "node_private.h"

/* What one node is going to have. */
struct part {
    struct pbk_node *node; /* a reference */
    struct pbk_source *source;
    struct pbk_source **sealed; /* the node's, with room for one more */
};

struct pbk_seal {
    struct pbk_nodes *nodes;
    size_t n;
    struct part *parts;
};

/* References to all nodes. */
static int collect(struct pbk_nodes *nodes, struct pbk_node ***all, size_t *n)
{
    int err = 0;
    *n = 0;
    pthread_rwlock_rdlock(&nodes->table_lock);
    *all = calloc(nodes->n_nodes ? nodes->n_nodes : 1, sizeof(**all));
    if (*all == NULL)
        err = -ENOMEM;
    for (size_t i = 0; err == 0 && i < nodes->n_buckets; i++) {
        for (struct pbk_node *node = nodes->buckets[i]; node != NULL; node = node->next) {
            atomic_fetch_add_explicit(&node->n_refs, 1, memory_order_relaxed);
            (*all)[(*n)++] = node;
        }
    }
    pthread_rwlock_unlock(&nodes->table_lock);
    return err;
}

static void free_part(struct pbk_nodes *nodes, struct part *part)
{
    if (part->source != NULL)
        pbk_source_destroy(&nodes->files, part->source);
    free(part->source);
    free(part->sealed);
}

/* Node lock held in any mode, the node has an object. */
static int make_part(struct part *part, const struct pbk_node *node, const char *label)
{
    const struct pbk_object *object = node->object;
    part->source = calloc(1, sizeof(*part->source));
    part->sealed = calloc((size_t)node->n_sealed + 1, sizeof(*part->sealed));
    if (part->source == NULL || part->sealed == NULL)
        return -ENOMEM;
    part->source->file.fd = -1;
    part->source->kind = PBK_SOURCE_OBJECT;
    part->source->label = strdup(label);
    part->source->name = strdup(object->file.path);
    part->source->bits = calloc(object->n_words ? object->n_words : 1, sizeof(*part->source->bits));
    part->source->n_words = object->n_words;
    return part->source->label == NULL || part->source->name == NULL || part->source->bits == NULL ? -ENOMEM : 0;
}

int pbk_nodes_prepare_seal(struct pbk_nodes *nodes, const char *label, struct pbk_seal **result)
{
    struct pbk_node **all;
    size_t n;
    int err = collect(nodes, &all, &n);
    struct pbk_seal *seal = calloc(1, sizeof(*seal));
    if (seal != NULL) {
        seal->nodes = nodes;
        seal->parts = calloc(n ? n : 1, sizeof(*seal->parts));
    }
    if (seal == NULL || seal->parts == NULL)
        err = -ENOMEM;
    for (size_t i = 0; i < n; i++) {
        struct pbk_node *node = all[i];
        pthread_rwlock_rdlock(&node->lock);
        bool is_part = err == 0 && node->object != NULL;
        if (is_part) {
            seal->parts[seal->n] = (struct part){.node = node};
            err = node->n_sealed < PBK_MAX_SOURCES ? make_part(&seal->parts[seal->n], node, label) : -E2BIG;
            seal->n++;
        }
        pthread_rwlock_unlock(&node->lock);
        if (!is_part)
            pbk_node_put(node);
    }
    free(all);
    if (err) {
        pbk_nodes_cancel_seal(seal);
        return err;
    }
    *result = seal;
    return 0;
}

static void end_seal(struct pbk_seal *seal)
{
    for (size_t i = 0; i < seal->n; i++) {
        free_part(seal->nodes, &seal->parts[i]);
        pbk_node_put(seal->parts[i].node);
    }
    free(seal->parts);
    free(seal);
}

void pbk_nodes_cancel_seal(struct pbk_seal *seal)
{
    if (seal != NULL)
        end_seal(seal);
}

static void seal_node(struct part *part)
{
    struct pbk_node *node = part->node;
    struct pbk_nodes *nodes = node->nodes;
    struct pbk_source *source = part->source;
    pthread_rwlock_wrlock(&node->lock);
    struct pbk_object *object = node->object;
    for (size_t i = 0; i < object->n_words; i++)
        source->bits[i] = atomic_load(&object->present[i]);
    source->is_whole = !object->is_mapped || atomic_load(&object->is_whole);
    source->limit = object->limit;
    pbk_file_move(&nodes->files, &object->file, &source->file);
    if (node->n_sealed > 0)
        memcpy(part->sealed, node->sealed, node->n_sealed * sizeof(*part->sealed));
    part->sealed[node->n_sealed++] = source;
    struct pbk_source **old = node->sealed;
    node->sealed = part->sealed;
    node->below_size = atomic_load(&node->size);
    node->object = NULL;
    pthread_rwlock_unlock(&node->lock);
    part->source = NULL;
    part->sealed = old; /* to be freed */
    node_free_object(nodes, object);
}

void pbk_nodes_seal(struct pbk_seal *seal, struct pbk_journal *journal, int objects_fd)
{
    struct pbk_nodes *nodes = seal->nodes;
    for (size_t i = 0; i < seal->n; i++)
        seal_node(&seal->parts[i]);
    pthread_mutex_lock(&nodes->store_lock);
    nodes->store = (struct pbk_store){.journal = journal, .objects_fd = objects_fd};
    pthread_mutex_unlock(&nodes->store_lock);
    end_seal(seal);
}

int pbk_nodes_sync(struct pbk_nodes *nodes)
{
    struct pbk_node **all;
    size_t n;
    int first = collect(nodes, &all, &n);
    for (size_t i = 0; i < n; i++) {
        struct pbk_node *node = all[i];
        pthread_rwlock_rdlock(&node->lock);
        struct pbk_object *object = node->object;
        if (object != NULL) {
            pthread_mutex_lock(&object->sync_lock);
            int err = node_sync_object(node, true);
            pthread_mutex_unlock(&object->sync_lock);
            if (err) {
                pbk_log_failure(&nodes->log, object->file.path, PBK_LOG_NO_BLOCK, "diff", "object can't be synced",
                                -err);
                first = first ? first : err;
            }
        }
        pthread_rwlock_unlock(&node->lock);
        pbk_node_put(node);
    }
    free(all);
    struct pbk_journal *journal = node_store(nodes).journal;
    return first == 0 && journal != NULL ? pbk_journal_sync(journal) : first;
}

int pbk_node_page_map(struct pbk_node *node, struct pbk_page_map *map)
{
    *map = (struct pbk_page_map){0};
    int err = PBK_NO_OBJECT;
    pthread_rwlock_rdlock(&node->lock);
    const struct pbk_object *object = node->object;
    if (object != NULL && object->is_mapped) {
        size_t n_words = ((size_t)object->limit + 63) / 64;
        uint64_t tail = object->limit % 64 ? (UINT64_C(1) << object->limit % 64) - 1 : UINT64_MAX;
        map->changed = calloc(n_words ? n_words : 1, sizeof(*map->changed));
        map->hydrated = calloc(n_words ? n_words : 1, sizeof(*map->hydrated));
        err = map->changed != NULL && map->hydrated != NULL ? 0 : -ENOMEM;
        for (size_t i = 0; err == 0 && i < n_words; i++) {
            uint64_t valid = i + 1 == n_words ? tail : UINT64_MAX;
            map->changed[i] = atomic_load(&object->changed[i]) & valid;
            map->hydrated[i] = atomic_load(&object->present[i]) & ~map->changed[i] & valid;
        }
        map->n_words = n_words;
        map->limit = object->limit;
        map->is_whole = atomic_load(&object->is_whole);
    }
    pthread_rwlock_unlock(&node->lock);
    if (err) {
        free(map->changed);
        free(map->hydrated);
        *map = (struct pbk_page_map){0};
    }
    return err;
}

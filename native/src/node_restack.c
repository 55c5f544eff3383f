/*
 * Restacking: what lies below the objects is named anew, because layers were folded. Every block is in the new sources what it
 * was in the old ones, so each node goes over by itself, while others are read and written.
 *
 * Memory is taken first, and then nothing can fail any more. Once all nodes have gone over, nothing refers to the old sources:
 * the descriptors that they were opened through can be closed.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>

#include "node_private.h"

/* What one node is going to have. */
struct pbk_restack {
    struct pbk_restack *next;
    struct pbk_node *node; /* a reference */
    uint64_t size;
    struct pbk_source *sources;
    unsigned n_sources;
    unsigned first_pages;
    atomic_uint_fast64_t *verified; /* room for as many blocks, if it has any */
    struct pbk_source **sealed;     /* afterwards: what it had */
    unsigned n_sealed;
};

/* As of pbk_node_verify. */
static size_t n_verified_words(uint64_t size)
{
    return (size_t)(blocks_of(size) / 64 + 1);
}

/* Pages of the base are what they were. The node is locked exclusively. */
static void move_verified(struct pbk_node *node, struct pbk_restack *part)
{
    atomic_uint_fast64_t *old = node->verified;
    size_t n_old = n_verified_words(node->sources_size);
    size_t n_new = n_verified_words(part->size);
    if (part->verified == NULL)
        return;
    for (size_t i = 0; i < n_old && i < n_new; i++)
        atomic_store(&part->verified[i], atomic_load(&old[i]));
    node->verified = part->verified;
    part->verified = old;
}

static void free_restack(struct pbk_restack *part)
{
    struct pbk_file_set *files = &part->node->nodes->files;
    for (unsigned i = 0; i < part->n_sources; i++)
        pbk_source_destroy(files, &part->sources[i]);
    free(part->sources);
    for (unsigned i = 0; i < part->n_sealed; i++) {
        pbk_source_destroy(files, part->sealed[i]);
        free(part->sealed[i]);
    }
    free(part->sealed);
    free(part->verified);
    pbk_node_put(part->node);
    free(part);
}

int pbk_nodes_prepare_restack(struct pbk_nodes *nodes, uint64_t ino, uint64_t size, const struct pbk_source_spec *specs,
                              unsigned n_specs, struct pbk_restack **all)
{
    struct pbk_node *node = pbk_nodes_get_any(nodes, ino);
    if (node == NULL)
        return -ENOENT;
    struct pbk_restack *part = calloc(1, sizeof(*part));
    if (part == NULL) {
        pbk_node_put(node);
        return -ENOMEM;
    }
    part->node = node;
    part->size = size;
    int err = node_make_sources(specs, n_specs, &part->sources, &part->n_sources, &part->first_pages);
    pthread_rwlock_rdlock(&node->lock);
    /* Nothing is read from below an object that is whole from its begin. */
    if (err == 0 && (node->object == NULL || node->object->is_mapped) && node->below_size != size)
        err = -EINVAL;
    if (err == 0 && node->verified != NULL) {
        part->verified = calloc(n_verified_words(size), sizeof(*part->verified));
        if (part->verified == NULL)
            err = -ENOMEM;
    }
    pthread_rwlock_unlock(&node->lock);
    if (err) {
        free_restack(part);
        return err;
    }
    part->next = *all;
    *all = part;
    return 0;
}

void pbk_nodes_cancel_restack(struct pbk_restack *all)
{
    while (all != NULL) {
        struct pbk_restack *next = all->next;
        free_restack(all);
        all = next;
    }
}

void pbk_nodes_restack(struct pbk_restack *all)
{
    for (struct pbk_restack *part = all; part != NULL; part = part->next) {
        struct pbk_node *node = part->node;
        struct pbk_source *sources = part->sources;
        unsigned n_sources = part->n_sources;
        pthread_rwlock_wrlock(&node->lock);
        part->sources = node->sources;
        part->n_sources = node->n_sources;
        part->sealed = node->sealed;
        part->n_sealed = node->n_sealed;
        node->sources = sources;
        node->n_sources = n_sources;
        node->first_pages = part->first_pages;
        move_verified(node, part);
        node->sources_size = part->size;
        node->sealed = NULL;
        node->n_sealed = 0;
        pbk_index_drop(&node->nodes->indexes, &node->index);
        pthread_rwlock_unlock(&node->lock);
    }
    pbk_nodes_cancel_restack(all); /* what is in it now are the old sources */
}

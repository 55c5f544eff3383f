/* The table of nodes, their lives, and what they share: see nodes.h and node.h. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>

#include "node_private.h"
#include "pbk/bytes.h"
#include "pbk/io.h"

#define FIRST_BUCKETS 1024u

/* A quarter of what the process may have: the rest is for sockets, logs and Python. */
static unsigned max_open_files(void)
{
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) != 0)
        return 64;
    rlim_t quarter = limit.rlim_cur / 4;
    if (quarter < 16)
        return 16;
    return quarter > 65536 ? 65536 : (unsigned)quarter;
}

struct pbk_nodes *pbk_nodes_new(struct pbk_journal *journal, int objects_fd, int log_fd, size_t index_bytes)
{
    struct pbk_nodes *nodes = calloc(1, sizeof(*nodes));
    if (nodes == NULL)
        return NULL;
    nodes->store = (struct pbk_store){.journal = journal, .objects_fd = objects_fd};
    nodes->n_buckets = FIRST_BUCKETS;
    nodes->buckets = calloc(nodes->n_buckets, sizeof(struct pbk_node *));
    if (nodes->buckets == NULL || pbk_log_init(&nodes->log, log_fd) != 0)
        goto no_log;
    if (pbk_file_set_init(&nodes->files, max_open_files(), &nodes->log, &nodes->counters.sync_errors) != 0)
        goto no_files;
    if (pbk_index_set_init(&nodes->indexes, index_bytes) != 0)
        goto no_indexes;
    if (pbk_gate_init(&nodes->gate) != 0)
        goto no_gate;
    if (pbk_names_init(&nodes->names) != 0)
        goto no_names;
    if (pbk_directories_init(&nodes->directories) != 0)
        goto no_directories;
    if (pthread_rwlock_init(&nodes->table_lock, NULL) != 0)
        goto no_lock;
    /* These can't fail with default attributes on Linux. */
    pthread_mutex_init(&nodes->store_lock, NULL);
    for (unsigned i = 0; i < PBK_N_STRIPES; i++)
        pthread_mutex_init(&nodes->stripes[i], NULL);
    return nodes;

no_lock:
    pbk_directories_destroy(&nodes->directories);
no_directories:
    pbk_names_destroy(&nodes->names);
no_names:
    pbk_gate_destroy(&nodes->gate);
no_gate:
    pbk_index_set_destroy(&nodes->indexes);
no_indexes:
    pbk_file_set_destroy(&nodes->files);
no_files:
    pbk_log_destroy(&nodes->log);
no_log:
    free(nodes->buckets);
    free(nodes);
    return NULL;
}

void pbk_nodes_clear(struct pbk_nodes *nodes)
{
    struct pbk_node *all = NULL;
    pthread_rwlock_wrlock(&nodes->table_lock);
    for (size_t i = 0; i < nodes->n_buckets; i++) {
        while (nodes->buckets[i] != NULL) {
            struct pbk_node *node = nodes->buckets[i];
            nodes->buckets[i] = node->next;
            node->next = all;
            all = node;
        }
    }
    nodes->n_nodes = 0;
    pthread_rwlock_unlock(&nodes->table_lock);
    while (all != NULL) {
        struct pbk_node *next = all->next;
        all->next = NULL;
        pbk_node_put(all);
        all = next;
    }
}

void pbk_nodes_free(struct pbk_nodes *nodes)
{
    if (nodes == NULL)
        return;
    pbk_nodes_clear(nodes);
    for (unsigned i = 0; i < PBK_N_STRIPES; i++)
        pthread_mutex_destroy(&nodes->stripes[i]);
    pthread_mutex_destroy(&nodes->store_lock);
    pthread_rwlock_destroy(&nodes->table_lock);
    pbk_directories_destroy(&nodes->directories);
    pbk_names_destroy(&nodes->names);
    pbk_gate_destroy(&nodes->gate);
    pbk_index_set_destroy(&nodes->indexes);
    pbk_file_set_destroy(&nodes->files);
    pbk_log_destroy(&nodes->log);
    free(nodes->buckets);
    free(nodes);
}

struct pbk_names *pbk_nodes_names(struct pbk_nodes *nodes)
{
    return &nodes->names;
}

struct pbk_directories *pbk_nodes_directories(struct pbk_nodes *nodes)
{
    return &nodes->directories;
}

bool pbk_nodes_answer_directory(struct pbk_nodes *nodes, uint64_t ino, void (*answer)(void *arg, const struct stat *),
                                void *arg)
{
    return pbk_directories_answer(&nodes->directories, ino, answer, arg);
}

bool pbk_nodes_is_absent(struct pbk_nodes *nodes, uint64_t directory, const void *name, size_t length)
{
    return pbk_names_is_absent(&nodes->names, directory, name, length);
}

struct pbk_store node_store(struct pbk_nodes *nodes)
{
    pthread_mutex_lock(&nodes->store_lock);
    struct pbk_store store = nodes->store;
    pthread_mutex_unlock(&nodes->store_lock);
    return store;
}

/* ---- the table ---- */

static size_t bucket_of(const struct pbk_nodes *nodes, uint64_t ino)
{
    uint64_t h = ino * 0x9E3779B97F4A7C15u;
    return (size_t)(h ^ h >> 32) & (nodes->n_buckets - 1);
}

static struct pbk_node **find_slot(struct pbk_nodes *nodes, uint64_t ino)
{
    struct pbk_node **slot = &nodes->buckets[bucket_of(nodes, ino)];
    while (*slot != NULL && (*slot)->ino != ino)
        slot = &(*slot)->next;
    return slot;
}

/* A table that can't grow for lack of memory only gets slower. */
static void grow_table(struct pbk_nodes *nodes)
{
    struct pbk_node **old = nodes->buckets;
    size_t n_old = nodes->n_buckets;
    struct pbk_node **buckets = calloc(n_old * 2, sizeof(struct pbk_node *));
    if (buckets == NULL)
        return;
    nodes->buckets = buckets;
    nodes->n_buckets = n_old * 2;
    for (size_t i = 0; i < n_old; i++) {
        while (old[i] != NULL) {
            struct pbk_node *node = old[i];
            old[i] = node->next;
            size_t b = bucket_of(nodes, node->ino);
            node->next = nodes->buckets[b];
            nodes->buckets[b] = node;
        }
    }
    free(old);
}

static struct pbk_node *get(struct pbk_nodes *nodes, uint64_t ino, bool is_published)
{
    pthread_rwlock_rdlock(&nodes->table_lock);
    struct pbk_node *node = *find_slot(nodes, ino);
    if (node != NULL && is_published && !node->is_published)
        node = NULL;
    if (node != NULL)
        atomic_fetch_add_explicit(&node->n_refs, 1, memory_order_relaxed);
    pthread_rwlock_unlock(&nodes->table_lock);
    return node;
}

struct pbk_node *pbk_nodes_get(struct pbk_nodes *nodes, uint64_t ino)
{
    return get(nodes, ino, true);
}

struct pbk_node *pbk_nodes_get_any(struct pbk_nodes *nodes, uint64_t ino)
{
    return get(nodes, ino, false);
}

int pbk_nodes_publish(struct pbk_nodes *nodes, uint64_t ino)
{
    pthread_rwlock_wrlock(&nodes->table_lock);
    struct pbk_node *node = *find_slot(nodes, ino);
    if (node != NULL)
        node->is_published = true;
    pthread_rwlock_unlock(&nodes->table_lock);
    return node != NULL ? 0 : -ENOENT;
}

int pbk_nodes_remove(struct pbk_nodes *nodes, uint64_t ino)
{
    pthread_rwlock_wrlock(&nodes->table_lock);
    struct pbk_node **slot = find_slot(nodes, ino);
    struct pbk_node *node = *slot;
    if (node != NULL) {
        *slot = node->next;
        node->next = NULL;
        nodes->n_nodes--;
    }
    pthread_rwlock_unlock(&nodes->table_lock);
    if (node == NULL)
        return -ENOENT;
    pbk_node_put(node);
    return 0;
}

/* ---- one node ---- */

void node_free_object(struct pbk_nodes *nodes, struct pbk_object *object)
{
    if (object == NULL)
        return;
    if (object->file.path != NULL)
        pbk_file_destroy(&nodes->files, &object->file);
    pthread_mutex_destroy(&object->sync_lock);
    free(object->present);
    free(object->changed);
    free(object->durable);
    free(object->recorded);
    free(object);
}

static void free_node(struct pbk_node *node)
{
    pbk_index_drop(&node->nodes->indexes, &node->index);
    node_free_object(node->nodes, node->object);
    for (unsigned i = 0; i < node->n_sealed; i++) {
        pbk_source_destroy(&node->nodes->files, node->sealed[i]);
        free(node->sealed[i]);
    }
    free(node->sealed);
    for (unsigned i = 0; i < node->n_sources; i++)
        pbk_source_destroy(&node->nodes->files, &node->sources[i]);
    free(node->sources);
    free(node->verified);
    pthread_mutex_destroy(&node->load_lock);
    pthread_rwlock_destroy(&node->lock);
    free(node);
}

void pbk_node_put(struct pbk_node *node)
{
    if (atomic_fetch_sub_explicit(&node->n_refs, 1, memory_order_acq_rel) == 1)
        free_node(node);
}

uint64_t pbk_node_ino(const struct pbk_node *node)
{
    return node->ino;
}

uint64_t pbk_node_size(struct pbk_node *node)
{
    return atomic_load(&node->size);
}

/* Objects stand above a base, and a base's data file is stored pages in all layers or a plain file in one. */
static int check_order(const struct pbk_source_spec *specs, unsigned n_specs)
{
    for (unsigned i = 1; i < n_specs; i++) {
        if (specs[i].kind == PBK_SOURCE_OBJECT && specs[i - 1].kind != PBK_SOURCE_OBJECT)
            return -EINVAL;
        if (specs[i].kind != specs[i - 1].kind && specs[i - 1].kind != PBK_SOURCE_OBJECT)
            return -EINVAL;
        if (specs[i].kind == PBK_SOURCE_RAW && specs[i - 1].kind == PBK_SOURCE_RAW)
            return -EINVAL;
    }
    return 0;
}

int node_make_sources(const struct pbk_source_spec *specs, unsigned n_specs, struct pbk_source **sources,
                      unsigned *n_sources, unsigned *first_pages)
{
    if (n_specs > PBK_MAX_SOURCES || check_order(specs, n_specs) != 0)
        return -EINVAL;
    int err = 0;
    *first_pages = n_specs;
    if (n_specs > 0) {
        *sources = calloc(n_specs, sizeof(**sources));
        if (*sources == NULL)
            err = -ENOMEM;
    }
    for (unsigned i = 0; err == 0 && i < n_specs; i++) {
        err = pbk_source_init(&(*sources)[i], &specs[i]);
        *n_sources = i + 1;
        if (specs[i].kind == PBK_SOURCE_PAGES && i < *first_pages)
            *first_pages = i;
    }
    return err;
}

/*
 * Whoever wants it alone goes before those who would share it: a scan by many, whose reads overlap without end, would keep the
 * first copy-up waiting, and with it Python. Nobody takes it twice. These can't fail on Linux.
 */
static void init_node_lock(pthread_rwlock_t *lock)
{
    pthread_rwlockattr_t attributes;
    pthread_rwlockattr_init(&attributes);
    pthread_rwlockattr_setkind_np(&attributes, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
    pthread_rwlock_init(lock, &attributes);
    pthread_rwlockattr_destroy(&attributes);
}

int pbk_nodes_add(struct pbk_nodes *nodes, uint64_t ino, uint64_t size, const struct pbk_source_spec *specs,
                  unsigned n_specs)
{
    if (size > INT64_MAX)
        return -EINVAL;
    struct pbk_node *node = calloc(1, sizeof(*node));
    if (node == NULL)
        return -ENOMEM;
    atomic_init(&node->n_refs, 1);
    atomic_init(&node->n_links, 1);
    node->nodes = nodes;
    node->ino = ino;
    node->below_size = node->sources_size = size;
    atomic_init(&node->size, size);
    init_node_lock(&node->lock);
    pthread_mutex_init(&node->load_lock, NULL);
    int err = node_make_sources(specs, n_specs, &node->sources, &node->n_sources, &node->first_pages);
    if (err) {
        free_node(node);
        return err;
    }
    pthread_rwlock_wrlock(&nodes->table_lock);
    if (nodes->n_nodes >= nodes->n_buckets)
        grow_table(nodes);
    struct pbk_node **slot = find_slot(nodes, ino);
    if (*slot == NULL) {
        *slot = node;
        nodes->n_nodes++;
    } else {
        err = -EEXIST;
    }
    pthread_rwlock_unlock(&nodes->table_lock);
    if (err)
        free_node(node);
    return err;
}

bool pbk_node_has_object(struct pbk_node *node)
{
    pthread_rwlock_rdlock(&node->lock);
    bool has = node->object != NULL;
    pthread_rwlock_unlock(&node->lock);
    return has;
}

/* Word i of a bitmap that the caller gave, without the blocks from the limit on. */
static uint64_t word_of(const uint8_t *bitmap, size_t n_bytes, size_t i, uint32_t limit)
{
    uint64_t word = i * 8 < n_bytes ? pbk_get_u64(bitmap + i * 8) : 0;
    return i == limit / 64 ? word & ((UINT64_C(1) << (limit % 64)) - 1) : word;
}

static int init_bitmaps(struct pbk_object *object, const struct pbk_attach *attach, uint32_t limit)
{
    size_t n_words = ((size_t)limit + 63) / 64;
    size_t room = n_words ? n_words : 1;
    object->n_words = n_words;
    object->present = calloc(room, sizeof(*object->present));
    object->changed = calloc(room, sizeof(*object->changed));
    object->durable = calloc(room, sizeof(*object->durable));
    object->recorded = calloc(room, sizeof(*object->recorded));
    if (object->present == NULL || object->changed == NULL || object->durable == NULL || object->recorded == NULL)
        return -ENOMEM;
    for (size_t i = 0; i < n_words; i++) {
        uint64_t changed = word_of(attach->bitmap, attach->bitmap_bytes, i, limit);
        uint64_t present = changed | word_of(attach->hydrated, attach->hydrated_bytes, i, limit);
        if (attach->is_whole)
            present = i == limit / 64 ? (UINT64_C(1) << (limit % 64)) - 1 : UINT64_MAX;
        atomic_init(&object->changed[i], changed);
        object->recorded[i] = changed;
        atomic_init(&object->present[i], present);
        object->durable[i] = present;
    }
    return 0;
}

int pbk_node_attach(struct pbk_node *node, struct pbk_ctx *ctx, const struct pbk_attach *attach)
{
    struct pbk_nodes *nodes = node->nodes;
    char path[32];
    struct stat st;
    struct pbk_object *object;
    int err;

    if (attach->bitmap_bytes % 8 != 0 || attach->hydrated_bytes % 8 != 0)
        return -EINVAL;
    if (attach->is_mapped && blocks_of(node->below_size) > PBK_MAX_BLOCKS)
        return -EFBIG;
    object = calloc(1, sizeof(*object));
    if (object == NULL)
        return -ENOMEM;
    pthread_mutex_init(&object->sync_lock, NULL);
    object->store = node_store(nodes);
    object->id = attach->object;
    object->is_mapped = attach->is_mapped;
    object->is_fresh = attach->is_fresh;
    atomic_init(&object->is_whole, attach->is_whole);
    object->file.fd = -1;
    snprintf(path, sizeof(path), "%02x/%llx", (unsigned)(attach->object & 255), (unsigned long long)attach->object);
    err = pbk_file_init(&object->file, object->store.objects_fd, path, O_RDWR);
    if (err == 0 && attach->is_mapped) {
        object->limit =
            attach->limit < blocks_of(node->below_size) ? attach->limit : (uint32_t)blocks_of(node->below_size);
        object->recorded_limit = object->limit;
        err = init_bitmaps(object, attach, object->limit);
        if (err == 0 && attach->limit != PBK_NO_LIMIT && object->store.journal != NULL) {
            /* The record may be known from the page cache only. */
            object->settled_end = pbk_journal_end(object->store.journal);
            atomic_store(&object->is_unsettled, true);
        }
    }
    if (err)
        goto fail;
    int fd = pbk_file_acquire(&nodes->files, &object->file);
    if (fd < 0) {
        err = fd;
        goto fail;
    }
    err = fstat(fd, &st) == 0 ? 0 : -errno;
    uint64_t size = err ? 0 : (uint64_t)st.st_size;
    pbk_file_release(&nodes->files, &object->file);
    if (err)
        goto fail;
    /* What was written before this mount may still be on its way to the disk. */
    atomic_store(&object->file.is_dirty, true);

    pthread_rwlock_wrlock(&node->lock);
    if (node->object != NULL) {
        pthread_rwlock_unlock(&node->lock);
        err = -EEXIST;
        goto fail;
    }
    node->object = object;
    atomic_store(&node->size, size);
    if (attach->is_mapped && object->store.journal != NULL && size < node->below_size &&
        (object->limit > blocks_of(size) ||
         (size % PBK_BLCKSZ != 0 && !object_has_changed(object, size / PBK_BLCKSZ)))) {
        /* The worker or the machine died inside of a truncate, between the object and its LIMIT record: finish it, or the
         * blocks that were cut off would come back from below when the file grows again. */
        atomic_store(&node->size, node->below_size);
        err = node_truncate_locked(node, ctx, size);
        if (err)
            node->object = NULL;
    }
    pthread_rwlock_unlock(&node->lock);
    if (err == 0)
        return 0;
fail:
    node_free_object(nodes, object);
    return err;
}

void pbk_node_opened(struct pbk_node *node)
{
    atomic_fetch_add(&node->n_handles, 1);
}

void pbk_node_released(struct pbk_node *node)
{
    /* What was opened before a takeover was not counted here. */
    unsigned n_handles = atomic_load(&node->n_handles);
    do {
        if (n_handles == 0)
            return;
    } while (!atomic_compare_exchange_weak(&node->n_handles, &n_handles, n_handles - 1));
    if (n_handles != 1)
        return;
    struct pbk_nodes *nodes = node->nodes;
    pthread_rwlock_rdlock(&node->lock);
    pbk_index_demote(&nodes->indexes, &node->index);
    for (unsigned i = 0; i < node->n_sources; i++)
        pbk_file_demote(&nodes->files, &node->sources[i].file);
    for (unsigned i = 0; i < node->n_sealed; i++)
        pbk_file_demote(&nodes->files, &node->sealed[i]->file);
    if (node->object != NULL)
        pbk_file_demote(&nodes->files, &node->object->file);
    pthread_rwlock_unlock(&node->lock);
}

/* ---- what they share ---- */

static uint64_t uses_of(const struct pbk_node *node)
{
    return atomic_load(&node->n_reads) + atomic_load(&node->n_changes);
}

static uint64_t handles_of(const struct pbk_node *node)
{
    return atomic_load(&node->n_handles);
}

static void visit_with_any(struct pbk_nodes *nodes, uint64_t (*count_of)(const struct pbk_node *),
                           void (*visit)(void *arg, uint64_t ino, uint64_t n), void *arg)
{
    pthread_rwlock_rdlock(&nodes->table_lock);
    for (size_t i = 0; i < nodes->n_buckets; i++) {
        for (const struct pbk_node *node = nodes->buckets[i]; node != NULL; node = node->next) {
            uint64_t n = count_of(node);
            if (n > 0)
                visit(arg, node->ino, n);
        }
    }
    pthread_rwlock_unlock(&nodes->table_lock);
}

void pbk_nodes_visit_heat(struct pbk_nodes *nodes, void (*visit)(void *arg, uint64_t ino, uint64_t n_uses), void *arg)
{
    visit_with_any(nodes, uses_of, visit, arg);
}

void pbk_nodes_visit_opened(struct pbk_nodes *nodes, void (*visit)(void *arg, uint64_t ino, uint64_t n_handles),
                            void *arg)
{
    visit_with_any(nodes, handles_of, visit, arg);
}

bool pbk_nodes_give_back_files(struct pbk_nodes *nodes)
{
    unsigned n_before = pbk_file_set_n_open(&nodes->files);
    unsigned n_tries = 0;
    pbk_file_set_relieve(&nodes->files, -EMFILE, &n_tries);
    return pbk_file_set_n_open(&nodes->files) < n_before;
}

void pbk_nodes_set_reserve(struct pbk_nodes *nodes, uint64_t bytes)
{
    atomic_store_explicit(&nodes->reserve_bytes, bytes, memory_order_relaxed);
}

size_t pbk_nodes_drop_indexes(struct pbk_nodes *nodes)
{
    return pbk_index_drop_all(&nodes->indexes);
}

void pbk_nodes_gate_close(struct pbk_nodes *nodes)
{
    pbk_gate_close(&nodes->gate);
}

int pbk_nodes_gate_open(struct pbk_nodes *nodes)
{
    return pbk_gate_open(&nodes->gate);
}

static void take_log_counts(struct pbk_nodes *nodes)
{
    pthread_mutex_lock(&nodes->log.lock);
    count(&nodes->counters.log_lines, nodes->log.n_lines);
    count(&nodes->counters.log_suppressed, nodes->log.n_suppressed);
    nodes->log.n_lines = nodes->log.n_suppressed = 0;
    pthread_mutex_unlock(&nodes->log.lock);
}

size_t pbk_nodes_counters(struct pbk_nodes *nodes, struct pbk_counter *out, size_t max)
{
    size_t n = 0;
    uint64_t gauge_index_bytes = pbk_index_bytes(&nodes->indexes);
    uint64_t gauge_open_files = pbk_file_set_n_open(&nodes->files);
    pthread_rwlock_rdlock(&nodes->table_lock);
    uint64_t gauge_nodes = nodes->n_nodes;
    pthread_rwlock_unlock(&nodes->table_lock);
    take_log_counts(nodes);
#define FILL_COUNTER(field)                                                                                            \
    if (n < max)                                                                                                       \
        out[n++] = (struct pbk_counter){#field, atomic_load(&nodes->counters.field)};
#define FILL_GAUGE(field)                                                                                              \
    if (n < max)                                                                                                       \
        out[n++] = (struct pbk_counter){#field, gauge_##field};
    PBK_NODES_COUNTERS(FILL_COUNTER, FILL_GAUGE)
#undef FILL_COUNTER
#undef FILL_GAUGE
    return n;
}

void pbk_nodes_reset_counters(struct pbk_nodes *nodes)
{
    take_log_counts(nodes);
#define RESET_COUNTER(field) atomic_store(&nodes->counters.field, 0);
#define RESET_GAUGE(field)
    PBK_NODES_COUNTERS(RESET_COUNTER, RESET_GAUGE)
#undef RESET_COUNTER
#undef RESET_GAUGE
}

/* A multiset of hashes with linear probing: see names.h. The empty name stands for "this directory is complete". */
#define _GNU_SOURCE
#include "pbk/names.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define FIRST_SLOTS 1024u

static uint64_t mix(uint64_t h)
{
    h ^= h >> 32;
    h *= 0xD6E8FEB86659FD93u;
    h ^= h >> 32;
    return h;
}

static uint64_t hash_of(uint64_t directory, const void *name, size_t length)
{
    const unsigned char *p = name;
    uint64_t h = mix(directory * 0x9E3779B97F4A7C15u + length);
    while (length > 0) {
        uint64_t word = 0;
        size_t n = length < sizeof word ? length : sizeof word;
        memcpy(&word, p, n);
        h = mix(h ^ word);
        p += n;
        length -= n;
    }
    return h ? h : 1;
}

int pbk_names_init(struct pbk_names *names)
{
    memset(names, 0, sizeof *names);
    return -pthread_rwlock_init(&names->lock, NULL);
}

void pbk_names_destroy(struct pbk_names *names)
{
    free(names->slots);
    pthread_rwlock_destroy(&names->lock);
}

static void put(struct pbk_names *names, uint64_t hash)
{
    size_t i = hash & (names->n_slots - 1);
    while (names->slots[i] != 0)
        i = (i + 1) & (names->n_slots - 1);
    names->slots[i] = hash;
}

static bool grow(struct pbk_names *names)
{
    size_t n_old = names->n_slots;
    uint64_t *old = names->slots;
    size_t n_slots = n_old ? n_old * 2 : FIRST_SLOTS;
    uint64_t *slots = calloc(n_slots, sizeof *slots);
    if (slots == NULL)
        return false;
    names->slots = slots;
    names->n_slots = n_slots;
    for (size_t i = 0; i < n_old; i++)
        if (old[i] != 0)
            put(names, old[i]);
    free(old);
    return true;
}

static void add_hash(struct pbk_names *names, uint64_t hash)
{
    pthread_rwlock_wrlock(&names->lock);
    if (names->n_used * 3 >= names->n_slots * 2 && !grow(names))
        names->is_lost = true;
    if (!names->is_lost) {
        put(names, hash);
        names->n_used++;
    }
    pthread_rwlock_unlock(&names->lock);
}

/* The slot of one such hash, or n_slots. */
static size_t find(const struct pbk_names *names, uint64_t hash)
{
    if (names->n_slots == 0)
        return 0;
    for (size_t i = hash & (names->n_slots - 1); names->slots[i] != 0; i = (i + 1) & (names->n_slots - 1))
        if (names->slots[i] == hash)
            return i;
    return names->n_slots;
}

void pbk_names_add(struct pbk_names *names, uint64_t directory, const void *name, size_t length)
{
    add_hash(names, hash_of(directory, name, length));
}

void pbk_names_complete(struct pbk_names *names, uint64_t directory)
{
    add_hash(names, hash_of(directory, NULL, 0));
}

void pbk_names_remove(struct pbk_names *names, uint64_t directory, const void *name, size_t length)
{
    uint64_t hash = hash_of(directory, name, length);
    pthread_rwlock_wrlock(&names->lock);
    size_t hole = find(names, hash);
    if (hole < names->n_slots) {
        size_t mask = names->n_slots - 1;
        /* What probed past the hole moves into it, so that no search ends too early. */
        for (size_t i = (hole + 1) & mask; names->slots[i] != 0; i = (i + 1) & mask) {
            size_t home = names->slots[i] & mask;
            if (((i - home) & mask) >= ((i - hole) & mask)) {
                names->slots[hole] = names->slots[i];
                hole = i;
            }
        }
        names->slots[hole] = 0;
        names->n_used--;
    }
    pthread_rwlock_unlock(&names->lock);
}

bool pbk_names_is_absent(struct pbk_names *names, uint64_t directory, const void *name, size_t length)
{
    uint64_t hash = hash_of(directory, name, length);
    uint64_t complete = hash_of(directory, NULL, 0);
    pthread_rwlock_rdlock(&names->lock);
    bool is_absent = !names->is_lost && find(names, complete) < names->n_slots && find(names, hash) >= names->n_slots;
    pthread_rwlock_unlock(&names->lock);
    return is_absent;
}

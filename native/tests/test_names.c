/* names.c: against a plain list, with removals, and read by threads while names come and go. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "pbk/names.h"

#define N_DIRECTORIES 7u
#define N_NAMES 3000u

static size_t name_of(unsigned number, char *name)
{
    return (size_t)sprintf(name, "%u_fsm", number);
}

static bool is_absent(struct pbk_names *names, uint64_t directory, unsigned number)
{
    char name[32];
    size_t length = name_of(number, name);
    return pbk_names_is_absent(names, directory, name, length);
}

static void test_against_a_list(void)
{
    static unsigned char count[N_DIRECTORIES][N_NAMES];
    struct pbk_names names;
    unsigned seed = 1;
    CHECK(pbk_names_init(&names) == 0);
    CHECK(!is_absent(&names, 1, 1)); /* nobody said that anything is complete */
    for (unsigned d = 0; d < N_DIRECTORIES; d++)
        pbk_names_complete(&names, d);
    for (unsigned round = 0; round < 200000; round++) {
        unsigned d = (unsigned)rand_r(&seed) % N_DIRECTORIES, n = (unsigned)rand_r(&seed) % N_NAMES;
        char name[32];
        size_t length = name_of(n, name);
        if (round / 20000 % 2 ? count[d][n] == 0 : count[d][n] < 2) {
            if (round / 20000 % 2 == 0) {
                pbk_names_add(&names, d, name, length);
                count[d][n]++;
            }
        } else if (count[d][n] > 0) {
            pbk_names_remove(&names, d, name, length);
            count[d][n]--;
        }
        n = (unsigned)rand_r(&seed) % N_NAMES;
        CHECK(is_absent(&names, d, n) == (count[d][n] == 0));
    }
    size_t n_left = N_DIRECTORIES;
    for (unsigned d = 0; d < N_DIRECTORIES; d++)
        for (unsigned n = 0; n < N_NAMES; n++) {
            CHECK(is_absent(&names, d, n) == (count[d][n] == 0));
            n_left += count[d][n];
        }
    CHECK(names.n_used == n_left);
    for (unsigned d = 0; d < N_DIRECTORIES; d++) {
        for (unsigned n = 0; n < N_NAMES; n++)
            for (; count[d][n] > 0; count[d][n]--) {
                char name[32];
                pbk_names_remove(&names, d, name, name_of(n, name));
            }
        CHECK(is_absent(&names, d, 0));
        pbk_names_remove(&names, d, "", 0);
        CHECK(!is_absent(&names, d, 0));
    }
    CHECK(names.n_used == 0);
    for (size_t i = 0; i < names.n_slots; i++)
        CHECK(names.slots[i] == 0);
    pbk_names_remove(&names, 1, "x", 1); /* what is not there */
    CHECK(names.n_used == 0);
    pbk_names_destroy(&names);
}

static void test_lost_name(void)
{
    struct pbk_names names;
    CHECK(pbk_names_init(&names) == 0);
    pbk_names_complete(&names, 1);
    CHECK(is_absent(&names, 1, 1));
    names.is_lost = true;
    CHECK(!is_absent(&names, 1, 1));
    pbk_names_destroy(&names);
}

struct shared {
    struct pbk_names names;
    atomic_bool is_done;
};

/* Names below 1000 are there all the time, those from 1000000 on never; the rest comes and goes. */
static void *look(void *arg)
{
    struct shared *s = arg;
    unsigned seed = 5;
    while (!atomic_load(&s->is_done)) {
        unsigned n = (unsigned)rand_r(&seed) % 1000;
        CHECK(!is_absent(&s->names, 1, n));
        CHECK(is_absent(&s->names, 1, 1000000 + n));
    }
    return NULL;
}

static void test_threads(void)
{
    struct shared s = {.is_done = false};
    pthread_t threads[2];
    CHECK(pbk_names_init(&s.names) == 0);
    char name[32];
    for (unsigned n = 0; n < 1000; n++)
        pbk_names_add(&s.names, 1, name, name_of(n, name));
    pbk_names_complete(&s.names, 1);
    for (unsigned t = 0; t < 2; t++)
        CHECK(pthread_create(&threads[t], NULL, look, &s) == 0);
    for (unsigned round = 0; round < 20; round++) {
        for (unsigned n = 1000; n < 3000; n++)
            pbk_names_add(&s.names, 1, name, name_of(n, name));
        for (unsigned n = 1000; n < 3000; n++)
            pbk_names_remove(&s.names, 1, name, name_of(n, name));
    }
    atomic_store(&s.is_done, true);
    for (unsigned t = 0; t < 2; t++)
        pthread_join(threads[t], NULL);
    pbk_names_destroy(&s.names);
}

int main(void)
{
    test_against_a_list();
    test_lost_name();
    test_threads();
    return 0;
}

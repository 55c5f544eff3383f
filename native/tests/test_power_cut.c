/*
 * What failing calls and power cuts leave. Every call that changes a file or makes it durable is taken over here
 * (-Wl,--wrap), so that
 *  - the order is checked: nothing is recorded as durable that was not synced, no file grows before its limit is durable;
 *  - each call in turn fails, once: the change it belongs to is reported as failed and is there wholly, partly or not at all,
 *    and nothing else is different;
 *  - the power is cut at each call in turn, on a disk that keeps nothing unasked: what was fsynced is there, and no block
 *    shows anything that it never held since.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <linux/falloc.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "pbk/bytes.h"
#include "pbk/io.h"
#include "pbk/journal.h"
#include "pbk/node.h"
#include "pbk/nodes.h"

#define CHECK(condition)                                                                                               \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "%s:%d: %s (call %u, operation %u)\n", __FILE__, __LINE__, #condition, n_calls,            \
                    operation);                                                                                        \
            abort();                                                                                                   \
        }                                                                                                              \
    } while (0)

#define N_BLOCKS 24u
#define MAX_SIZE (40u * PBK_BLCKSZ)
#define BELOW_SIZE (N_BLOCKS * PBK_BLCKSZ - 1000)
#define OBJECT 0x17u
#define MAX_STATES 80

static char directory[4096];
static unsigned operation;

/* ---- the disk ---- */

enum fault { FAULT_NONE, FAULT_ERROR, FAULT_POWER };

static unsigned n_calls;
static unsigned fault_at;
static enum fault fault;
static bool is_armed;
static bool is_dark; /* the power is off: nothing succeeds any more */
static ino_t journal_ino;
static ino_t object_ino;

/* What is certainly on the disk. */
static uint8_t disk_object[MAX_SIZE];
static uint64_t disk_size;
static uint8_t disk_journal[1 << 20];
static uint64_t disk_journal_size;
/* What the page cache has beyond it. */
static bool is_dirty[MAX_SIZE / PBK_BLCKSZ];
static bool is_lost[MAX_SIZE / PBK_BLCKSZ]; /* by a failed sync: clean, says the kernel, but not on the disk */
static bool is_size_dirty;
static uint64_t limit_end; /* of the journal, behind the newest LIMIT record */
static uint64_t journal_end;

static ino_t ino_of(int fd)
{
    struct stat st;
    CHECK(fstat(fd, &st) == 0);
    return st.st_ino;
}

static uint64_t size_of(int fd)
{
    struct stat st;
    CHECK(fstat(fd, &st) == 0);
    return (uint64_t)st.st_size;
}

/* True if this call is the one to fail. */
static bool fails(void)
{
    if (is_dark)
        return true;
    if (!is_armed || fault == FAULT_NONE || ++n_calls != fault_at)
        return false;
    is_dark = fault == FAULT_POWER;
    return true;
}

static void check_growth(int fd, uint64_t end)
{
    if (is_armed && ino_of(fd) == object_ino && end > size_of(fd))
        CHECK(limit_end <= disk_journal_size);
}

/* An appended frame claims something about the object. */
static void check_frame(const uint8_t *payload, uint64_t end)
{
    if (payload[0] == PBK_RECORD_PAGES || payload[0] == PBK_RECORD_HYDRATED) {
        uint32_t n = pbk_get_u32(payload + 9);
        for (uint32_t i = 0; i < n; i++) {
            uint32_t first = pbk_get_u32(payload + 13 + (size_t)i * 8);
            uint32_t count = pbk_get_u32(payload + 17 + (size_t)i * 8);
            for (uint32_t b = first; b < first + count; b++)
                CHECK(!is_dirty[b]);
        }
    } else if (payload[0] == PBK_RECORD_WHOLE) {
        for (size_t b = 0; b < MAX_SIZE / PBK_BLCKSZ; b++)
            CHECK(!is_dirty[b]);
    } else if (payload[0] == PBK_RECORD_LIMIT) {
        CHECK(!is_size_dirty);
        limit_end = end;
    }
}

int __real_pbk_pwritev_full(int fd, struct iovec *iov, int n_iov, uint64_t off);
int __wrap_pbk_pwritev_full(int fd, struct iovec *iov, int n_iov, uint64_t off);
int __real_pbk_ftruncate(int fd, uint64_t size);
int __wrap_pbk_ftruncate(int fd, uint64_t size);
int __real_pbk_fdatasync(int fd);
int __wrap_pbk_fdatasync(int fd);
int __real_pbk_fallocate(int fd, int mode, uint64_t off, uint64_t n);
int __wrap_pbk_fallocate(int fd, int mode, uint64_t off, uint64_t n);
int __wrap_pbk_pwrite_full(int fd, const void *buf, size_t n, uint64_t off);
int __wrap_pbk_fsync(int fd);

int __wrap_pbk_pwritev_full(int fd, struct iovec *iov, int n_iov, uint64_t off)
{
    uint64_t n = 0;
    for (int i = 0; i < n_iov; i++)
        n += iov[i].iov_len;
    bool is_journal = is_armed && ino_of(fd) == journal_ino;
    check_growth(fd, off + n);
    bool is_failing = fails();
    if (is_failing) {
        if (is_dark)
            return -EIO;
        /* Half of the first piece gets there. */
        iov[0].iov_len /= 2;
        n = iov[0].iov_len;
        n_iov = 1;
    }
    uint8_t payload[4096];
    if (is_journal && !is_failing) {
        CHECK(n_iov == 2 && iov[1].iov_len <= sizeof(payload));
        memcpy(payload, iov[1].iov_base, iov[1].iov_len);
    }
    int err = n > 0 ? __real_pbk_pwritev_full(fd, iov, n_iov, off) : 0;
    CHECK(err == 0);
    if (is_journal) {
        if (!is_failing) {
            journal_end = off + n;
            check_frame(payload, journal_end);
        }
    } else if (is_armed && n > 0) {
        for (uint64_t b = off / PBK_BLCKSZ; b <= (off + n - 1) / PBK_BLCKSZ; b++) {
            is_dirty[b] = true;
            is_lost[b] = false;
        }
    }
    return is_failing ? -ENOSPC : 0;
}

int __wrap_pbk_pwrite_full(int fd, const void *buf, size_t n, uint64_t off)
{
    struct iovec iov = {.iov_base = (void *)(uintptr_t)buf, .iov_len = n};
    return __wrap_pbk_pwritev_full(fd, &iov, 1, off);
}

int __wrap_pbk_ftruncate(int fd, uint64_t size)
{
    if (is_armed && ino_of(fd) == journal_ino) {
        /* The rollback of a failed append: fails by itself only with the power. */
        if (is_dark)
            return -EIO;
        return __real_pbk_ftruncate(fd, size);
    }
    check_growth(fd, size);
    if (fails())
        return -EIO;
    if (is_armed && ino_of(fd) == object_ino)
        is_size_dirty = true;
    return __real_pbk_ftruncate(fd, size);
}

int __wrap_pbk_fdatasync(int fd)
{
    if (fails()) {
        if (ino_of(fd) == object_ino)
            memcpy(is_lost, is_dirty, sizeof(is_lost));
        return -EIO;
    }
    if (!is_armed)
        return 0;
    if (ino_of(fd) == journal_ino) {
        disk_journal_size = size_of(fd);
        CHECK(pbk_pread_full(fd, disk_journal, sizeof(disk_journal), 0) == (ssize_t)disk_journal_size);
    } else if (ino_of(fd) == object_ino) {
        disk_size = size_of(fd);
        memset(disk_object, 0, sizeof(disk_object));
        CHECK(pbk_pread_full(fd, disk_object, sizeof(disk_object), 0) == (ssize_t)disk_size);
        memcpy(is_dirty, is_lost, sizeof(is_dirty));
        is_size_dirty = false;
    }
    return 0;
}

int __wrap_pbk_fsync(int fd)
{
    return __wrap_pbk_fdatasync(fd);
}

int __wrap_pbk_fallocate(int fd, int mode, uint64_t off, uint64_t n)
{
    if (!(mode & FALLOC_FL_KEEP_SIZE))
        check_growth(fd, off + n);
    if (fails())
        return -ENOSPC;
    if (is_armed && mode & FALLOC_FL_PUNCH_HOLE)
        for (uint64_t b = off / PBK_BLCKSZ; b < (off + n) / PBK_BLCKSZ && b < MAX_SIZE / PBK_BLCKSZ; b++)
            is_dirty[b] = true;
    return __real_pbk_fallocate(fd, mode, off, n);
}

/* ---- a mount ---- */

struct mount {
    int root;
    int objects;
    int journal_fd;
    struct pbk_journal *journal;
    struct pbk_nodes *nodes;
    struct pbk_node *node;
    struct pbk_ctx *ctx;
};

static uint8_t below[MAX_SIZE];

static void path_of(char *path, const char *name)
{
    CHECK(snprintf(path, 4200, "%s/%s", directory, name) < 4200);
}

static void put_file(const char *name, const void *bytes, size_t n)
{
    char path[4200];
    path_of(path, name);
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    CHECK(fd >= 0 && write(fd, bytes, n) == (ssize_t)n);
    close(fd);
}

static void begin(struct mount *m)
{
    char path[4200];
    struct stat st;
    static const uint8_t session[17] = {PBK_RECORD_SESSION, 1};
    struct pbk_journal_scan scan;
    static const uint8_t no_session[16];

    path_of(path, "");
    m->root = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    path_of(path, "objects");
    m->objects = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    path_of(path, "journal");
    m->journal_fd = open(path, O_RDWR | O_CLOEXEC);
    CHECK(m->root >= 0 && m->objects >= 0 && m->journal_fd >= 0);
    CHECK(pbk_journal_scan(m->journal_fd, no_session, NULL, NULL, &scan) == 0);
    m->journal = pbk_journal_new(m->journal_fd, scan.end);
    CHECK(m->journal != NULL && pbk_journal_append(m->journal, session, sizeof(session), NULL) == 0);
    m->nodes = pbk_nodes_new(m->journal, m->objects, -1, 1 << 20);
    m->ctx = pbk_ctx_new(1 << 20);
    CHECK(m->nodes != NULL && m->ctx != NULL);
    struct pbk_source_spec spec = {
        .kind = PBK_SOURCE_RAW, .dir_fd = m->root, .path = "below", .label = "base", .size = BELOW_SIZE};
    CHECK(pbk_nodes_add(m->nodes, 1, BELOW_SIZE, &spec, 1) == 0);
    m->node = pbk_nodes_get_any(m->nodes, 1);
    struct pbk_attach attach = {.object = OBJECT, .limit = PBK_NO_LIMIT, .is_mapped = true};
    for (size_t i = 0; i < scan.n_maps; i++) {
        if (scan.maps[i].object != OBJECT)
            continue;
        attach.limit = scan.maps[i].limit;
        attach.is_whole = scan.maps[i].whole;
        /* Little-endian machines only, as everywhere in these tests. */
        attach.bitmap = (const uint8_t *)scan.maps[i].changed.words;
        attach.bitmap_bytes = scan.maps[i].changed.n_words * 8;
        attach.hydrated = (const uint8_t *)scan.maps[i].hydrated.words;
        attach.hydrated_bytes = scan.maps[i].hydrated.n_words * 8;
    }
    CHECK(pbk_node_attach(m->node, m->ctx, &attach) == 0);
    pbk_journal_scan_free(&scan);
    path_of(path, "objects/17/17");
    CHECK(stat(path, &st) == 0);
    object_ino = st.st_ino;
    journal_ino = ino_of(m->journal_fd);
}

static void end(struct mount *m)
{
    pbk_node_put(m->node);
    pbk_nodes_free(m->nodes);
    pbk_journal_free(m->journal);
    pbk_ctx_free(m->ctx);
    close(m->root);
    close(m->objects);
    close(m->journal_fd);
}

/* A new diff with an object that was just made, all of it durable. */
static void make_diff(void)
{
    char path[4200];
    static uint8_t header[PBK_JOURNAL_HEADER] = "PBKFSJNL\1";
    path_of(path, "objects");
    CHECK(mkdir(path, 0700) == 0 || errno == EEXIST);
    path_of(path, "objects/17");
    CHECK(mkdir(path, 0700) == 0 || errno == EEXIST);
    put_file("below", below, BELOW_SIZE);
    put_file("journal", header, sizeof(header));
    put_file("objects/17/17", "", 0);
    path_of(path, "objects/17/17");
    CHECK(truncate(path, BELOW_SIZE) == 0);
    memset(disk_object, 0, sizeof(disk_object));
    disk_size = BELOW_SIZE;
    memcpy(disk_journal, header, sizeof(header));
    disk_journal_size = sizeof(header);
    memset(is_dirty, 0, sizeof(is_dirty));
    memset(is_lost, 0, sizeof(is_lost));
    is_size_dirty = false;
    limit_end = 0;
    n_calls = 0;
    is_dark = false;
}

/* ---- the scenario ---- */

struct state {
    uint8_t bytes[MAX_SIZE]; /* zeros behind the end */
    uint64_t size;
};

enum what { WRITE, TRUNCATE, ALLOCATE, PUNCH, FSYNC, HYDRATE };

struct step {
    enum what what;
    uint64_t off;
    uint64_t n;
};

#define B(blocks) ((uint64_t)((blocks) * PBK_BLCKSZ))

static const struct step scenario[] = {
    {TRUNCATE, 0, B(23) + 50}, /* inside of the last block: no limit falls */
    {ALLOCATE, B(24), B(1)},
    {WRITE, B(3) + 4096, 4096},
    {WRITE, B(5), B(2)},
    {FSYNC, 0, 0},
    {WRITE, B(3), 4096},
    {WRITE, B(23), 100}, /* the last, partial block */
    {FSYNC, 1, 0},
    {WRITE, B(9), B(3)}, /* recorded nowhere when it is cut off */
    {TRUNCATE, 0, B(10) + 100},
    {WRITE, B(12), 50},
    {FSYNC, 0, 0},
    {TRUNCATE, 0, B(8)},
    {ALLOCATE, B(8), B(3)},
    {PUNCH, B(1), B(2)},
    {PUNCH, B(6) + 500, B(1)},
    {FSYNC, 0, 0},
    {WRITE, B(1), 10},
    {HYDRATE, 0, B(4)},
    {WRITE, B(4) + 77, 1000},
    {FSYNC, 0, 0},
    {HYDRATE, 0, B(100)},
    {WRITE, B(4) + 2000, 1000},
    {WRITE, B(0) + 2000, 1000},
    {TRUNCATE, 0, B(7) + 1},
    {TRUNCATE, 0, B(20)},
    {FSYNC, 1, 0},
    {TRUNCATE, 0, B(2) + 5},
    {TRUNCATE, 0, B(2) + 7},
    {WRITE, B(3) - 1, 2},
    {TRUNCATE, 0, 0},
    {WRITE, 0, B(1)},
    {FSYNC, 0, 0},
};

static void fill(uint8_t *data, size_t n, unsigned seed)
{
    for (size_t i = 0; i < n; i++)
        data[i] = (uint8_t)(seed * 37 + i / 512 + 1);
}

/* The change in the model. */
static void apply(struct state *s, const struct step *step, const uint8_t *data)
{
    uint64_t stop = step->off + step->n;
    switch (step->what) {
    case WRITE:
        memcpy(s->bytes + step->off, data, step->n);
        break;
    case TRUNCATE:
        if (step->n < s->size)
            memset(s->bytes + step->n, 0, s->size - step->n);
        s->size = step->n;
        return;
    case ALLOCATE:
        break;
    case PUNCH:
        memset(s->bytes + step->off, 0, step->n);
        return;
    default:
        return;
    }
    if (stop > s->size)
        s->size = stop;
}

static int perform(struct mount *m, const struct step *step, const uint8_t *data)
{
    uint64_t next;
    ssize_t r;
    switch (step->what) {
    case WRITE:
        r = pbk_node_write(m->node, m->ctx, step->off, data, step->n);
        return r < 0 ? (int)r : 0;
    case TRUNCATE:
        return pbk_node_truncate(m->node, m->ctx, step->n);
    case ALLOCATE:
        return pbk_node_fallocate(m->node, m->ctx, 0, step->off, step->n);
    case PUNCH:
        return pbk_node_fallocate(m->node, m->ctx, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, step->off, step->n);
    case FSYNC:
        return pbk_node_fsync(m->node, step->off != 0);
    default:
        r = pbk_node_hydrate(m->node, m->ctx, step->off, step->n, &next);
        if (r < 0)
            return (int)r;
        r = pbk_node_hydrate_sync(m->node);
        return r < 0 ? (int)r : 0;
    }
}

static void read_state(struct mount *m, struct state *s)
{
    struct iovec iov[2];
    int n_iov;
    memset(s, 0, sizeof(*s));
    s->size = pbk_node_size(m->node);
    CHECK(s->size <= MAX_SIZE);
    ssize_t r = pbk_node_read(m->node, m->ctx, 0, MAX_SIZE, iov, 2, &n_iov);
    CHECK(r == (ssize_t)s->size);
    if (r > 0)
        memcpy(s->bytes, iov[1].iov_base, (size_t)r);
}

/* The state since the last fsync, oldest first: what a cut may leave, block by block. */
static struct state states[MAX_STATES];
static unsigned n_states;

static void push_state(const struct state *s)
{
    CHECK(n_states < MAX_STATES);
    states[n_states++] = *s;
}

/* After a change that failed: each byte is as before or as asked for, and the size is one of both or, of a write that came
 * half-way, in between. */
static void check_partial(const struct state *found, const struct state *before, const struct state *after)
{
    uint64_t low = before->size < after->size ? before->size : after->size;
    uint64_t high = before->size < after->size ? after->size : before->size;
    CHECK(found->size >= low && found->size <= high);
    for (uint64_t i = 0; i < found->size; i++)
        CHECK(found->bytes[i] == before->bytes[i] || found->bytes[i] == after->bytes[i]);
}

/* Runs until the end, or until the power is gone. *n_failed: operations that did not succeed. */
static void run_scenario(struct mount *m, unsigned *n_failed)
{
    static struct state now;
    static struct state before;
    static uint8_t data[MAX_SIZE];
    bool is_unsyncable = false;

    read_state(m, &now);
    n_states = 0;
    push_state(&now);
    *n_failed = 0;
    is_armed = true;
    for (operation = 0; operation < sizeof(scenario) / sizeof(scenario[0]) && !is_dark; operation++) {
        const struct step *step = &scenario[operation];
        unsigned calls_before = n_calls;
        fill(data, step->n < MAX_SIZE ? step->n : 0, operation);
        before = now;
        apply(&now, step, data);
        int err = perform(m, step, data);
        bool is_hit = fault != FAULT_NONE && calls_before < fault_at && n_calls >= fault_at;
        if (is_dark) {
            push_state(&now);
            break;
        }
        if (err) {
            /* Without a fault of its own, only what a failed sync made impossible for good. */
            CHECK(is_hit || is_unsyncable);
            ++*n_failed;
            is_unsyncable = is_unsyncable || err == -EIO;
            static struct state after;
            after = now;
            read_state(m, &now);
            check_partial(&now, &before, &after);
            push_state(&after);
        } else {
            static struct state found;
            read_state(m, &found);
            CHECK(found.size == now.size && memcmp(found.bytes, now.bytes, sizeof(now.bytes)) == 0);
            if (step->what == FSYNC) {
                for (size_t b = 0; b < MAX_SIZE / PBK_BLCKSZ; b++)
                    CHECK(!is_dirty[b]);
                CHECK(!is_size_dirty && disk_journal_size == journal_end);
                n_states = 0;
            }
        }
        push_state(&now);
    }
    is_armed = false;
}

/* ---- after a power cut ---- */

/* If the file has the size of state k: what a state before it had cut off can only be of that state or a later one. */
static bool has_no_cut_bytes(const struct state *found, unsigned k)
{
    for (uint64_t i = 0; i < found->size; i++) {
        unsigned first = 0;
        for (unsigned j = 0; j < k; j++)
            if (states[j].size <= i)
                first = j;
        bool is_known = false;
        for (unsigned j = first; j < n_states && !is_known; j++)
            is_known = found->bytes[i] == states[j].bytes[i];
        if (!is_known)
            return false;
    }
    return true;
}

static void check_recovered(const struct state *found)
{
    bool is_size_known = false;
    for (unsigned i = 0; i < n_states; i++)
        is_size_known = is_size_known || (found->size == states[i].size && has_no_cut_bytes(found, i));
    /* Or the write that was under way grew the file piece by piece. */
    if (n_states > 1 && scenario[operation].what == WRITE)
        is_size_known =
            is_size_known || (found->size > states[n_states - 2].size && found->size < states[n_states - 1].size &&
                              has_no_cut_bytes(found, n_states - 1));
    CHECK(is_size_known);
    for (uint64_t at = 0; at < found->size; at += PBK_BLCKSZ) {
        size_t n = found->size - at < PBK_BLCKSZ ? (size_t)(found->size - at) : PBK_BLCKSZ;
        bool is_known = false;
        for (unsigned i = 0; i < n_states; i++)
            is_known = is_known || memcmp(found->bytes + at, states[i].bytes + at, n) == 0;
        CHECK(is_known);
    }
}

/* A cut that only the metadata of the object survived, besides what was synced: its size may be of any time since. */
static void recover(uint64_t size)
{
    static struct state found;
    static struct state grown;
    static uint8_t object[MAX_SIZE];
    struct mount m;
    char path[4200];

    is_dark = false;
    memset(object, 0, sizeof(object));
    memcpy(object, disk_object, disk_size < size ? disk_size : size);
    put_file("objects/17/17", object, size);
    put_file("journal", disk_journal, disk_journal_size);
    begin(&m);
    read_state(&m, &found);
    check_recovered(&found);
    /* Nothing that was cut off comes back, now or after another mount. */
    CHECK(pbk_node_truncate(m.node, m.ctx, B(36)) == 0 && pbk_node_fsync(m.node, true) == 0);
    memset(found.bytes + found.size, 0, MAX_SIZE - found.size);
    found.size = B(36);
    for (unsigned i = 0; i < 2; i++) {
        read_state(&m, &grown);
        CHECK(grown.size == found.size && memcmp(grown.bytes, found.bytes, sizeof(found.bytes)) == 0);
        if (i == 0) {
            end(&m);
            begin(&m);
        }
    }
    end(&m);
    path_of(path, "objects/17/17");
    CHECK(unlink(path) == 0);
}

/* ---- */

static unsigned run_with(enum fault kind, unsigned at)
{
    struct mount m;
    unsigned n_failed;
    struct stat st;
    char path[4200];

    make_diff();
    fault = FAULT_NONE;
    begin(&m);
    /* The mount's own SESSION record. */
    disk_journal_size = size_of(m.journal_fd);
    CHECK(pbk_pread_full(m.journal_fd, disk_journal, sizeof(disk_journal), 0) == (ssize_t)disk_journal_size);
    journal_end = disk_journal_size;
    fault = kind;
    fault_at = at;
    run_scenario(&m, &n_failed);
    unsigned n = n_calls;
    bool was_cut = is_dark;
    fault = FAULT_NONE;
    is_dark = false;
    CHECK(kind != FAULT_NONE || n_failed == 0);
    CHECK(kind != FAULT_ERROR || n < at || n_failed > 0);
    end(&m);
    if (was_cut) {
        path_of(path, "objects/17/17");
        CHECK(stat(path, &st) == 0);
        uint64_t cached_size = (uint64_t)st.st_size;
        uint64_t synced_size = disk_size;
        recover(synced_size);
        if (cached_size != synced_size)
            recover(cached_size);
    }
    return n;
}

static int remove_entry(const char *path, const struct stat *st, int flag, struct FTW *ftw)
{
    (void)st;
    (void)flag;
    (void)ftw;
    return remove(path);
}

static void remove_directory(void)
{
    nftw(directory, remove_entry, 16, FTW_DEPTH | FTW_PHYS);
}

int main(void)
{
    const char *tmp = getenv("TMPDIR");
    snprintf(directory, sizeof(directory), "%s/pbkfs-power-cut.XXXXXX", tmp != NULL ? tmp : "/tmp");
    CHECK(mkdtemp(directory) != NULL);
    atexit(remove_directory);
    for (size_t i = 0; i < BELOW_SIZE; i++)
        below[i] = (uint8_t)(200 + i / 2048);
    run_with(FAULT_NONE, 0);
    /* One more than there are: a run with a fault that never comes, to know when to stop. */
    for (enum fault kind = FAULT_ERROR; kind <= FAULT_POWER; kind++) {
        unsigned at = 1;
        while (run_with(kind, at) >= at)
            at++;
        CHECK(at > 60);
    }
    return 0;
}

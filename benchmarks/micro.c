/* One file-system workload, timed in C so that no interpreter is in the figure.
 *
 *   micro MODE ARGS…      prints {"ops": n, "bytes": n, "seconds": s, "cpu": s, "p50": us, "p99": us}
 *
 * seqread FILE BLOCK            the whole file, in order
 * randread FILE N THREADS SEED  n reads of 8 KiB at random 8 KiB offsets, shared by the threads
 * overwrite FILE N SEED SYNC    n writes of 8 KiB at random 8 KiB offsets; SYNC 1: fsync at the end
 * commit FILE N                 n times: write 8 KiB in order, fdatasync
 * create DIR N                  n times: create, write 8 KiB, close, unlink
 * openclose FILE N
 * list DIR                      read the directory and stat every entry
 * inflate THREADS FILE…         inflate all pages of stored data files with libdeflate, nothing else
 *
 * cpu is that of this process. Latencies are of single operations where there is one to time.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <err.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#ifdef HAVE_LIBDEFLATE
#include <libdeflate.h>
#endif

enum { PAGE = 8192 };

static double now(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (double)ts.tv_sec + (double)ts.tv_nsec / 1e9;
}

static uint64_t random_next(uint64_t *state)
{
    uint64_t z = (*state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

static float *latencies;
static size_t n_latencies;

static int compare(const void *a, const void *b)
{
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

static int report(uint64_t ops, uint64_t bytes, double seconds)
{
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    double cpu = (double)usage.ru_utime.tv_sec + (double)usage.ru_stime.tv_sec +
                 (double)(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) / 1e6;
    double p50 = 0, p99 = 0;
    if (n_latencies) {
        qsort(latencies, n_latencies, sizeof *latencies, compare);
        p50 = latencies[n_latencies / 2];
        p99 = latencies[n_latencies * 99 / 100];
    }
    printf("{\"ops\": %llu, \"bytes\": %llu, \"seconds\": %.6f, \"cpu\": %.6f, \"p50\": %.1f, "
           "\"p99\": %.1f}\n",
           (unsigned long long)ops, (unsigned long long)bytes, seconds, cpu, p50, p99);
    return 0;
}

static int open_file(const char *path, int flags)
{
    int fd = open(path, flags | O_CLOEXEC);
    if (fd < 0)
        err(1, "%s", path);
    return fd;
}

static uint64_t n_pages_of(int fd, const char *path)
{
    struct stat st;
    if (fstat(fd, &st))
        err(1, "%s", path);
    if (st.st_size < PAGE)
        errx(1, "%s is empty", path);
    return (uint64_t)st.st_size / PAGE;
}

static int run_seqread(const char *path, size_t block)
{
    char *buffer = malloc(block);
    int fd = open_file(path, O_RDONLY);
    uint64_t bytes = 0, ops = 0;
    double start = now();
    ssize_t n;
    while ((n = read(fd, buffer, block)) > 0) {
        bytes += (uint64_t)n;
        ops++;
    }
    if (n < 0)
        err(1, "%s", path);
    double end = now();
    free(buffer);
    close(fd);
    return report(ops, bytes, end - start);
}

struct reader {
    pthread_t thread;
    int fd;
    uint64_t n, n_pages, seed;
    float *latency;
};

static void *read_pages(void *arg)
{
    struct reader *r = arg;
    _Alignas(64) char buffer[PAGE];
    for (uint64_t i = 0; i < r->n; i++) {
        off_t offset = (off_t)(random_next(&r->seed) % r->n_pages) * PAGE;
        double start = now();
        if (pread(r->fd, buffer, PAGE, offset) != PAGE)
            err(1, "read at %lld", (long long)offset);
        r->latency[i] = (float)((now() - start) * 1e6);
    }
    return NULL;
}

static int run_randread(const char *path, uint64_t n, uint64_t n_threads, uint64_t seed)
{
    struct reader readers[64];
    if (n_threads < 1 || n_threads > 64)
        errx(1, "threads");
    n -= n % n_threads;
    n_latencies = n;
    latencies = malloc(n * sizeof *latencies);
    int fd = open_file(path, O_RDONLY);
    /* As PostgreSQL's access pattern looks to the kernel: no advice, ordinary read-ahead. */
    uint64_t n_pages = n_pages_of(fd, path);
    double start = now();
    for (uint64_t t = 0; t < n_threads; t++) {
        readers[t] = (struct reader){.fd = fd,
                                     .n = n / n_threads,
                                     .n_pages = n_pages,
                                     .seed = seed * 1000003 + t,
                                     .latency = latencies + t * (n / n_threads)};
        if (pthread_create(&readers[t].thread, NULL, read_pages, &readers[t]))
            errx(1, "pthread_create");
    }
    for (uint64_t t = 0; t < n_threads; t++)
        pthread_join(readers[t].thread, NULL);
    double end = now();
    close(fd);
    return report(n, n * PAGE, end - start);
}

static void fill(char *buffer, uint64_t seed)
{
    for (size_t i = 0; i < PAGE; i += 8) {
        uint64_t word = random_next(&seed);
        memcpy(buffer + i, &word, 8);
    }
}

static int run_overwrite(const char *path, uint64_t n, uint64_t seed, int has_sync)
{
    static char buffer[PAGE];
    fill(buffer, seed);
    int fd = open_file(path, O_RDWR);
    uint64_t n_pages = n_pages_of(fd, path);
    n_latencies = n;
    latencies = malloc(n * sizeof *latencies);
    double start = now();
    for (uint64_t i = 0; i < n; i++) {
        off_t offset = (off_t)(random_next(&seed) % n_pages) * PAGE;
        memcpy(buffer, &i, sizeof i);
        double before = now();
        if (pwrite(fd, buffer, PAGE, offset) != PAGE)
            err(1, "%s", path);
        latencies[i] = (float)((now() - before) * 1e6);
    }
    if (has_sync && fsync(fd))
        err(1, "%s", path);
    double end = now();
    close(fd);
    return report(n, n * PAGE, end - start);
}

static int run_commit(const char *path, uint64_t n)
{
    static char buffer[PAGE];
    fill(buffer, 1);
    int fd = open_file(path, O_RDWR);
    uint64_t n_pages = n_pages_of(fd, path);
    n_latencies = n;
    latencies = malloc(n * sizeof *latencies);
    double start = now();
    for (uint64_t i = 0; i < n; i++) {
        memcpy(buffer, &i, sizeof i);
        double before = now();
        if (pwrite(fd, buffer, PAGE, (off_t)(i % n_pages) * PAGE) != PAGE || fdatasync(fd))
            err(1, "%s", path);
        latencies[i] = (float)((now() - before) * 1e6);
    }
    double end = now();
    close(fd);
    return report(n, n * PAGE, end - start);
}

static int run_create(const char *directory, uint64_t n)
{
    static char buffer[PAGE];
    int dir = open_file(directory, O_RDONLY | O_DIRECTORY);
    double start = now();
    for (uint64_t i = 0; i < n; i++) {
        char name[32];
        snprintf(name, sizeof name, "%llu", 90000 + (unsigned long long)i);
        int fd = openat(dir, name, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
        if (fd < 0 || pwrite(fd, buffer, PAGE, 0) != PAGE || close(fd) || unlinkat(dir, name, 0))
            err(1, "%s/%s", directory, name);
    }
    double end = now();
    close(dir);
    return report(n, n * PAGE, end - start);
}

static int run_openclose(const char *path, uint64_t n)
{
    double start = now();
    for (uint64_t i = 0; i < n; i++)
        close(open_file(path, O_RDWR));
    return report(n, 0, now() - start);
}

static int run_list(const char *path)
{
    uint64_t n = 0;
    double start = now();
    DIR *dir = opendir(path);
    if (!dir)
        err(1, "%s", path);
    for (struct dirent *entry; (entry = readdir(dir));) {
        struct stat st;
        if (fstatat(dirfd(dir), entry->d_name, &st, AT_SYMLINK_NOFOLLOW))
            err(1, "%s/%s", path, entry->d_name);
        n++;
    }
    double end = now();
    closedir(dir);
    return report(n, 0, end - start);
}

#ifdef HAVE_LIBDEFLATE
enum { CHUNK = 128 }; /* pages a thread takes at once: 1 MiB, as one read request */

static struct {
    const unsigned char *data;
    const uint32_t *at; /* offsets of the records */
    size_t n;
    size_t next;
    pthread_mutex_t lock;
} work;

static void *inflate_pages(void *arg)
{
    static _Thread_local char page[PAGE];
    struct libdeflate_decompressor *d = libdeflate_alloc_decompressor();
    (void)arg;
    for (;;) {
        pthread_mutex_lock(&work.lock);
        size_t from = work.next, to = from + CHUNK < work.n ? from + CHUNK : work.n;
        work.next = to;
        pthread_mutex_unlock(&work.lock);
        if (from >= to)
            break;
        for (size_t i = from; i < to; i++) {
            int32_t length;
            memcpy(&length, work.data + work.at[i] + 4, 4);
            const unsigned char *payload = work.data + work.at[i] + 8;
            if (length == PAGE)
                memcpy(page, payload, PAGE);
            else if (libdeflate_zlib_decompress(d, payload, (size_t)length, page, PAGE, NULL))
                errx(1, "page %zu does not inflate", i);
        }
    }
    libdeflate_free_decompressor(d);
    return NULL;
}

static int run_inflate(unsigned n_threads, char **paths, int n_paths)
{
    pthread_t threads[64];
    uint64_t n_pages = 0, n_bytes = 0;
    double seconds = 0;
    pthread_mutex_init(&work.lock, NULL);
    for (int f = 0; f < n_paths; f++) {
        int fd = open_file(paths[f], O_RDONLY);
        struct stat st;
        if (fstat(fd, &st))
            err(1, "%s", paths[f]);
        size_t size = (size_t)st.st_size, at = 0, n = 0;
        double start = now();
        unsigned char *data = malloc(size);
        uint32_t *offsets = malloc(sizeof *offsets * (size / 9 + 1));
        for (size_t got = 0; got < size;) {
            ssize_t r = pread(fd, data + got, size - got, (off_t)got);
            if (r <= 0)
                err(1, "%s", paths[f]);
            got += (size_t)r;
        }
        while (at + 8 <= size) {
            int32_t length;
            memcpy(&length, data + at + 4, 4);
            offsets[n++] = (uint32_t)at;
            at += 8 + (size_t)length;
        }
        work.data = data;
        work.at = offsets;
        work.n = n;
        work.next = 0;
        for (unsigned t = 0; t < n_threads; t++)
            if (pthread_create(&threads[t], NULL, inflate_pages, NULL))
                errx(1, "pthread_create");
        for (unsigned t = 0; t < n_threads; t++)
            pthread_join(threads[t], NULL);
        seconds += now() - start;
        n_pages += n;
        n_bytes += size;
        free(data);
        free(offsets);
        close(fd);
    }
    (void)n_bytes;
    return report(n_pages, n_pages * PAGE, seconds);
}
#endif

static uint64_t number(const char *text)
{
    return strtoull(text, NULL, 10);
}

int main(int argc, char **argv)
{
    const char *mode = argc > 1 ? argv[1] : "";
    if (!strcmp(mode, "seqread") && argc == 4)
        return run_seqread(argv[2], number(argv[3]));
    if (!strcmp(mode, "randread") && argc == 6)
        return run_randread(argv[2], number(argv[3]), number(argv[4]), number(argv[5]));
    if (!strcmp(mode, "overwrite") && argc == 6)
        return run_overwrite(argv[2], number(argv[3]), number(argv[4]), argv[5][0] == '1');
    if (!strcmp(mode, "commit") && argc == 4)
        return run_commit(argv[2], number(argv[3]));
    if (!strcmp(mode, "create") && argc == 4)
        return run_create(argv[2], number(argv[3]));
    if (!strcmp(mode, "openclose") && argc == 4)
        return run_openclose(argv[2], number(argv[3]));
    if (!strcmp(mode, "list") && argc == 3)
        return run_list(argv[2]);
#ifdef HAVE_LIBDEFLATE
    if (!strcmp(mode, "inflate") && argc >= 4)
        return run_inflate((unsigned)number(argv[2]), argv + 3, argc - 3);
#endif
    fprintf(stderr, "usage: see the head of micro.c\n");
    return 2;
}

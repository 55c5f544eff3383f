/* A directory of a target, with the files that its nodes need; gone when the process ends. */
#ifndef PBK_FUZZ_PLACE_H
#define PBK_FUZZ_PLACE_H

#include <fcntl.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include "fuzz.h"
#include "pbk/io.h"

static int place_fd = -1;
static char place_path[256];

static void remove_place(void)
{
    static const char *const names[] = {"stored", "objects/01/1", "objects/01", "objects"};
    for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++)
        unlinkat(place_fd, names[i], i < 2 ? 0 : AT_REMOVEDIR);
    rmdir(place_path);
}

/* Makes it at the first call. Returns its descriptor. */
static inline int open_place(void)
{
    if (place_fd >= 0)
        return place_fd;
    const char *parent = getenv("TMPDIR");
    snprintf(place_path, sizeof(place_path), "%s/pbkfs-fuzz.XXXXXX", parent != NULL ? parent : "/tmp");
    CHECK(mkdtemp(place_path) != NULL);
    place_fd = open(place_path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    CHECK(place_fd >= 0 && mkdirat(place_fd, "objects", 0700) == 0 && mkdirat(place_fd, "objects/01", 0700) == 0);
    atexit(remove_place);
    /* Whatever the input asks for: no file gets long. */
    struct rlimit limit = {.rlim_cur = 16u << 20, .rlim_max = RLIM_INFINITY};
    CHECK(setrlimit(RLIMIT_FSIZE, &limit) == 0 && signal(SIGXFSZ, SIG_IGN) != SIG_ERR);
    return place_fd;
}

static inline void write_place(const char *name, const uint8_t *data, size_t n)
{
    int fd = openat(open_place(), name, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    CHECK(fd >= 0 && pbk_pwrite_full(fd, data, n, 0) == 0);
    close(fd);
}

#endif

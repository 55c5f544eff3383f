/* Opening beneath a directory without leaving it: by openat2(2), and where a kernel or a sandbox does not have it. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "check.h"
#include "pbk/io.h"

static void make_file(int dir_fd, const char *path)
{
    int fd = openat(dir_fd, path, O_CREAT | O_RDWR | O_CLOEXEC, 0600);
    CHECK(fd >= 0);
    CHECK(write(fd, path, 1) == 1);
    close(fd);
}

/* What a sandbox that does not know the call answers: ENOSYS. For good. */
static void lose_openat2(void)
{
    struct sock_filter filter[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_openat2, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | ENOSYS),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {.len = sizeof(filter) / sizeof(filter[0]), .filter = filter};
    CHECK(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0);
    CHECK(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0);
    CHECK(syscall(SYS_openat2, -1, "", NULL, 0) == -1 && errno == ENOSYS);
}

static void check_paths(int dir_fd)
{
    static const char *const good[] = {"file", "a/b/file"};
    static const char *const bad[] = {
        "../outside", "a/../../outside", "/etc/passwd", "link",     "a/link", "up/outside", "up", "within/b/file",
        "fifo",       "a/b/file/more",   "a",           "a/absent", "",
    };
    int n_open = dup(dir_fd);
    close(n_open);
    for (size_t i = 0; i < sizeof(good) / sizeof(good[0]); i++) {
        int fd = pbk_open_beneath(dir_fd, good[i], O_RDONLY);
        CHECK(fd >= 0);
        close(fd);
    }
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        int fd = pbk_open_beneath(dir_fd, bad[i], O_RDONLY);
        if (fd >= 0)
            fprintf(stderr, "opened: %s\n", bad[i]);
        CHECK(fd < 0);
    }
    int now = dup(dir_fd);
    CHECK(now == n_open); /* none was left open */
    close(now);
}

int main(void)
{
    const char *tmp = getenv("TMPDIR");
    char root[256];
    snprintf(root, sizeof(root), "%s/pbkfs-confined.XXXXXX", tmp != NULL ? tmp : "/tmp");
    CHECK(mkdtemp(root) != NULL);
    int root_fd = open(root, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    CHECK(root_fd >= 0);
    CHECK(mkdirat(root_fd, "store", 0700) == 0);
    make_file(root_fd, "outside");
    int dir_fd = openat(root_fd, "store", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    CHECK(dir_fd >= 0);
    CHECK(mkdirat(dir_fd, "a", 0700) == 0);
    CHECK(mkdirat(dir_fd, "a/b", 0700) == 0);
    make_file(dir_fd, "file");
    make_file(dir_fd, "a/b/file");
    CHECK(symlinkat("../outside", dir_fd, "link") == 0);
    CHECK(symlinkat("b/file", dir_fd, "a/link") == 0);
    CHECK(symlinkat("..", dir_fd, "up") == 0);
    CHECK(symlinkat("a", dir_fd, "within") == 0);
    CHECK(mkfifoat(dir_fd, "fifo", 0600) == 0);

    check_paths(dir_fd);
    lose_openat2();
    check_paths(dir_fd);

    static const char *const made[] = {"store/fifo", "store/within", "store/up",       "store/a/link",
                                       "store/link", "store/file",   "store/a/b/file", "outside"};
    for (size_t i = 0; i < sizeof(made) / sizeof(made[0]); i++)
        CHECK(unlinkat(root_fd, made[i], 0) == 0);
    static const char *const directories[] = {"store/a/b", "store/a", "store"};
    for (size_t i = 0; i < sizeof(directories) / sizeof(directories[0]); i++)
        CHECK(unlinkat(root_fd, directories[i], AT_REMOVEDIR) == 0);
    CHECK(rmdir(root) == 0);
    close(dir_fd);
    close(root_fd);
    return 0;
}

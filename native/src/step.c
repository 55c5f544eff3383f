/* Labelled steps, see the header. */
#define _GNU_SOURCE
#include "pbk/step.h"

#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

atomic_bool pbk_steps_armed;

/* Constant once armed. */
static const char *log_path;
static const char *fatal;
static atomic_uint n_left;
static bool dies_by_signal;

void pbk_steps_arm(const char *log, const char *die_at, unsigned n, bool by_signal)
{
    dies_by_signal = by_signal;
    log_path = log;
    fatal = die_at;
    atomic_store(&n_left, n);
    atomic_store(&pbk_steps_armed, true);
}

void pbk_step_reached(const char *label)
{
    struct iovec iov[2] = {
        {.iov_base = (void *)(uintptr_t)label, .iov_len = strlen(label)},
        {.iov_base = (void *)(uintptr_t)"\n", .iov_len = 1},
    };
    /* Opened each time: a daemon closes descriptors that it does not know. */
    int fd = open(log_path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (fd >= 0) {
        (void)!writev(fd, iov, 2);
        close(fd);
    }
    if (strcmp(label, fatal) != 0 || atomic_fetch_sub(&n_left, 1) != 1)
        return;
    if (dies_by_signal)
        kill(getpid(), SIGKILL);
    _exit(PBK_STEP_EXIT_CODE);
}

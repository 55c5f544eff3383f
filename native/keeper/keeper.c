/*
 * The program beside a worker, in two parts.
 *
 * The keeper: the small process that owns a mount, keeps its connection with the kernel open, and has a new worker take over when
 * the worker dies. A program of its own, because it lives as long as the mount and so has to be small.
 *
 * usage: pbkfs-keeper keep SOCKET PID, descriptor and process of the first worker, whose parent this process is (pbkfs/mount/keeping.py).
 *
 * It never touches the mount, the diff or the base, but for a line in the worker's log at a death: nothing can block it on what it
 * is there to save. It and its workers talk over a SEQPACKET socket: a message is a list of strings, each with a NUL at its end,
 * and descriptors beside them. It stays as it is over upgrades, so that language may only grow.
 *
 * worker -> keeper
 *   armed    fd=NAME arg=WORD log=PATH style=text|json: from now on a death is to be survived, by the command of these words
 *   added    fd=NAME: one more descriptor, or another one of that name
 *   warm     a new worker has imported all that it needs
 *   serving  a new worker serves
 *   replace  arg=WORD: have another program take over, on purpose
 *   over     the connection is to end with this worker, whoever still uses the mount
 * keeper -> worker
 *   go       fd=NAME why=TEXT takeovers=N: take over
 *
 * And calls that wait for the mount itself (pbkfs/aside.py): sync PATH, of the files below it that are named on stdin, each with a
 * NUL at its end; umount PATH FLAGS. The exit code is 0 or the first errno.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define MAX_MESSAGE 65536
#define MAX_FDS 64
#define MAX_NAME 64
#define MAX_WORDS 256

/* A worker's words at its end: unmounted; nobody can take over. */
#define EXIT_DONE 0
#define EXIT_REFUSED 64

/* So many deaths in a row without so much service are taken for a cause that does not go away, and so are more than so many in an
 * hour. (The limits that have an #ifndef are others in tests.) */
#define MAX_DEATHS 5
#ifndef SERVICE_MS
#define SERVICE_MS 1000
#endif
#ifndef MAX_DEATHS_AN_HOUR
#define MAX_DEATHS_AN_HOUR 100
#endif
#define HOUR_MS 3600000
#define PAUSE_MS 200
/* What is to replace a worker has so long to get ready; else the worker stays. */
#define WARM_LIMIT_MS 60000
/* So long after a death somebody has to serve: whoever uses the mount waits, and can't even be killed. */
#ifndef TAKEOVER_LIMIT_MS
#define TAKEOVER_LIMIT_MS 300000
#endif

extern char **environ;

/* Words, each with a NUL at its end. */
struct words {
    char *text;
    size_t length;
};

/* One worker: its process, which is a child and so keeps its number until it was waited for, and this end of the socket to it. pid
 * is 0 where there is none. */
struct child {
    pid_t pid;
    int sock;
    bool is_silent; /* its end of the socket is closed: it is about to die */
    bool is_serving;
    int64_t serving_at;
};

/* What is kept for the next worker, by name. */
struct kept {
    char name[MAX_NAME];
    int fd;
};

static struct child worker;
static struct child heir; /* is to replace the worker on purpose, and gets ready */
static bool heir_is_warm;
static int64_t heir_until;
static int64_t serving_until; /* 0: somebody serves */
static struct words command, fallback, heir_command;
static struct kept kept[MAX_FDS];
static size_t n_kept;
static bool is_incomplete; /* something could not be kept, so nobody can take over */
static char *log_path;
static bool log_is_json;
static unsigned n_deaths, n_takeovers;
static int64_t deaths[MAX_DEATHS_AN_HOUR]; /* when; the next one takes the place of the oldest, at next_death */
static unsigned next_death;
static bool is_ending; /* somebody wants the mount to end, and no worker has been told */
static int signals = -1;
static char message[MAX_MESSAGE];

static int64_t now_ms(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

/* Writes a line about an error into the worker's log, in its format. */
static void say(const char *format, ...) __attribute__((format(printf, 1, 2)));
static void say(const char *format, ...)
{
    char text[512], line[768], moment[32];
    struct timespec now;
    struct tm parts;
    va_list args;

    if (!log_path)
        return;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    clock_gettime(CLOCK_REALTIME, &now);
    gmtime_r(&now.tv_sec, &parts);
    strftime(moment, sizeof moment, "%Y-%m-%dT%H:%M:%S", &parts);
    int ms = (int)(now.tv_nsec / 1000000), pid = (int)getpid();
    int length;
    if (log_is_json)
        length = snprintf(line, sizeof line,
                          "{\"time\": \"%s.%03dZ\", \"level\": \"error\", \"pid\": %d, \"logger\": \"pbkfs.keeper\", "
                          "\"message\": \"%s\"}\n",
                          moment, ms, pid, text);
    else
        length = snprintf(line, sizeof line, "%s.%03dZ ERROR   [%d] pbkfs.keeper: %s\n", moment, ms, pid, text);
    /* Not kept open, because logs are rotated. */
    int fd = open(log_path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC | O_NOCTTY | O_NOFOLLOW | O_NONBLOCK, 0640);
    if (fd < 0)
        return;
    struct stat st;
    if (fstat(fd, &st) == 0 && S_ISREG(st.st_mode)) {
        ssize_t written = write(fd, line, (size_t)length);
        (void)written; /* there is nobody else to tell */
    }
    close(fd);
}

/* --- children ----------------------------------------------------------------------------------------------------- */

static void forget(struct child *child)
{
    close(child->sock);
    memset(child, 0, sizeof *child);
}

/* Starts a worker, which gets its end of the socket as descriptor 3; pid is 0 if it can't be. */
static struct child spawn(const struct words *what)
{
    struct child none = {0};
    char *argv[MAX_WORDS + 1];
    size_t n = 0;
    for (char *word = what->text; word < what->text + what->length && n < MAX_WORDS; word += strlen(word) + 1)
        argv[n++] = word;
    argv[n] = NULL;

    int pair[2];
    if (n == 0 || socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair))
        return none;
    posix_spawn_file_actions_t actions;
    posix_spawnattr_t attributes;
    sigset_t nothing, defaults;
    sigemptyset(&nothing);
    sigfillset(&defaults);
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, pair[1], 3);
    posix_spawnattr_init(&attributes);
    posix_spawnattr_setsigmask(&attributes, &nothing);
    posix_spawnattr_setsigdefault(&attributes, &defaults);
    posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF);
    pid_t pid;
    int error = posix_spawn(&pid, argv[0], &actions, &attributes, argv, environ);
    posix_spawn_file_actions_destroy(&actions);
    posix_spawnattr_destroy(&attributes);
    close(pair[1]);
    if (error) {
        close(pair[0]);
        say("a worker can't be started: %s", strerror(error));
        return none;
    }
    return (struct child){.pid = pid, .sock = pair[0]};
}

/* Lets the worker go on: what was to replace it is not able to. */
static void drop_heir(const char *why)
{
    say("worker %d stays; %d was to replace it, but %s", (int)worker.pid, (int)heir.pid, why);
    forget(&heir);
}

/* --- messages ----------------------------------------------------------------------------------------------------- */

static void keep(const char *name, int fd)
{
    size_t i = 0;
    while (i < n_kept && strcmp(kept[i].name, name))
        i++;
    if (i == n_kept && (n_kept == MAX_FDS || strlen(name) >= MAX_NAME)) {
        is_incomplete = true;
        close(fd);
        return;
    }
    if (i == n_kept)
        n_kept++;
    else
        close(kept[i].fd);
    strcpy(kept[i].name, name);
    kept[i].fd = fd;
}

static void drop(const char *name)
{
    for (size_t i = 0; i < n_kept; i++)
        if (!strcmp(kept[i].name, name)) {
            close(kept[i].fd);
            kept[i] = kept[--n_kept];
            return;
        }
}

static bool is_kept(const char *name)
{
    for (size_t i = 0; i < n_kept; i++)
        if (!strcmp(kept[i].name, name))
            return true;
    return false;
}

static void take_words(struct words *to, const char *text, size_t length)
{
    char *copy = malloc(length + 1);
    if (copy)
        memcpy(copy, text, length);
    free(to->text);
    to->text = copy;
    to->length = copy ? length : 0; /* no words can't be started */
}

/* Has the worker unmount, as whoever signalled the keeper wants, once there is one that can. */
static void forward_end(void)
{
    if (is_ending && (!is_kept("fuse") || worker.is_serving)) {
        is_ending = false;
        kill(worker.pid, SIGTERM);
    }
}

static const char *after(const char *word, const char *prefix)
{
    size_t length = strlen(prefix);
    return strncmp(word, prefix, length) ? NULL : word + length;
}

static void act(struct child *child, const char *event, const struct words *args)
{
    if (!strcmp(event, "armed")) {
        take_words(&command, args->text, args->length);
        child->is_serving = true;
        child->serving_at = now_ms();
    } else if (!strcmp(event, "serving")) {
        child->is_serving = true;
        child->serving_at = now_ms();
        serving_until = 0;
        n_takeovers++;
        forward_end();
    } else if (!strcmp(event, "over") && child == &worker) {
        drop("fuse");
    } else if (!strcmp(event, "replace") && !heir.pid && child == &worker) {
        take_words(&heir_command, args->text, args->length);
        heir = spawn(&heir_command);
        heir_is_warm = false;
        heir_until = now_ms() + WARM_LIMIT_MS;
    } else if (!strcmp(event, "warm") && child == &heir) {
        heir_is_warm = true;
        /* An end on purpose is one by SIGKILL, too: there is only one way to take over. The time begins now, for one that
         * can't die. */
        serving_until = now_ms() + TAKEOVER_LIMIT_MS;
        kill(worker.pid, SIGKILL);
    } /* else it is of a later version */
}

/* Takes one message of a worker. */
static void receive(struct child *child)
{
    static char args[MAX_MESSAGE];
    union {
        struct cmsghdr align;
        char room[CMSG_SPACE(sizeof(int) * MAX_FDS)];
    } control;
    struct iovec iov = {.iov_base = message, .iov_len = sizeof message - 1};
    struct msghdr header = {
        .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control.room, .msg_controllen = sizeof control.room};
    ssize_t length;
    do
        length = recvmsg(child->sock, &header, MSG_CMSG_CLOEXEC);
    while (length < 0 && errno == EINTR);
    if (length <= 0) {
        child->is_silent = true;
        return;
    }
    message[length] = '\0';

    int fds[MAX_FDS];
    size_t n_fds = 0, i_fd = 0;
    for (struct cmsghdr *c = CMSG_FIRSTHDR(&header); c; c = CMSG_NXTHDR(&header, c))
        if (c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS) {
            n_fds = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
            memcpy(fds, CMSG_DATA(c), n_fds * sizeof(int));
        }
    if (header.msg_flags & (MSG_TRUNC | MSG_CTRUNC))
        is_incomplete = true; /* for want of descriptors, for example */
    struct words words = {.text = args, .length = 0};
    const char *end = message + length, *value;
    for (const char *word = message + strlen(message) + 1; word < end; word += strlen(word) + 1) {
        if ((value = after(word, "fd=")) && i_fd < n_fds) {
            keep(value, fds[i_fd++]);
        } else if ((value = after(word, "arg="))) {
            memcpy(args + words.length, value, strlen(value) + 1);
            words.length += strlen(value) + 1;
        } else if ((value = after(word, "log="))) {
            free(log_path);
            log_path = strdup(value);
        } else if ((value = after(word, "style="))) {
            log_is_json = !strcmp(value, "json");
        }
    }
    while (i_fd < n_fds)
        close(fds[i_fd++]);
    act(child, message, &words);
}

static size_t add(size_t length, const char *format, ...) __attribute__((format(printf, 2, 3)));
static size_t add(size_t length, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    int n = vsnprintf(message + length, sizeof message - length, format, args);
    va_end(args);
    return length + (size_t)n + 1;
}

/* Gives the worker what is kept. It may be dead already, which is seen next. */
static void tell_to_go(const char *why)
{
    union {
        struct cmsghdr align;
        char room[CMSG_SPACE(sizeof(int) * MAX_FDS)];
    } control;
    size_t length = add(0, "go");
    length = add(length, "why=%s", why);
    length = add(length, "takeovers=%u", n_takeovers + 1);
    memset(&control, 0, sizeof control);
    struct msghdr header = {.msg_control = control.room, .msg_controllen = CMSG_SPACE(sizeof(int) * n_kept)};
    struct cmsghdr *rights = CMSG_FIRSTHDR(&header);
    rights->cmsg_level = SOL_SOCKET;
    rights->cmsg_type = SCM_RIGHTS;
    rights->cmsg_len = CMSG_LEN(sizeof(int) * n_kept);
    for (size_t i = 0; i < n_kept; i++) {
        length = add(length, "fd=%s", kept[i].name);
        memcpy(CMSG_DATA(rights) + i * sizeof(int), &kept[i].fd, sizeof(int));
    }
    struct iovec iov = {.iov_base = message, .iov_len = length};
    header.msg_iov = &iov;
    header.msg_iovlen = 1;
    if (sendmsg(worker.sock, &header, MSG_NOSIGNAL) < 0)
        say("worker %d can't be told: %s", (int)worker.pid, strerror(errno));
}

/* --- a death ------------------------------------------------------------------------------------------------------ */

static void wait_ms(long ms)
{
    struct timespec left = {.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000};
    while (nanosleep(&left, &left) && errno == EINTR)
        ;
}

/* Whether the program before an upgrade is to try now. */
static bool go_back(void)
{
    if (!fallback.length)
        return false;
    say("going back to the program before");
    take_words(&command, fallback.text, fallback.length);
    fallback.length = 0;
    n_deaths = 0;
    memset(deaths, 0, sizeof deaths);
    return true;
}

/* Notes a death; whether it is one too many in an hour. */
static bool is_too_many(void)
{
    int64_t oldest = deaths[next_death], now = now_ms();
    deaths[next_death] = now;
    next_death = (next_death + 1) % MAX_DEATHS_AN_HOUR;
    return oldest && now - oldest < HOUR_MS;
}

/* The worker has ended, with an exit code or a signal's number below zero: has another one take over. Returns an exit code where
 * that ends, else -1. */
static int bury(int code)
{
    struct pollfd last_words = {.fd = worker.sock, .events = POLLIN};
    while (!worker.is_silent && poll(&last_words, 1, 0) > 0)
        receive(&worker);
    int64_t served_ms = worker.is_serving ? now_ms() - worker.serving_at : 0;
    int pid = (int)worker.pid;
    forget(&worker);
    if (code == EXIT_DONE || !is_kept("fuse"))
        return code >= 0 ? code : 1;
    char how[128];
    if (code < 0)
        snprintf(how, sizeof how, "worker %d died of signal %d", pid, -code);
    else
        snprintf(how, sizeof how, "worker %d failed (%d)", pid, code);
    if (code == EXIT_REFUSED || is_incomplete) {
        say("nobody can take over; the mount ends");
        return EXIT_REFUSED;
    }
    if (!serving_until)
        serving_until = now_ms() + TAKEOVER_LIMIT_MS;
    bool is_wanted = heir.pid && heir_is_warm;
    n_deaths = is_wanted || served_ms >= SERVICE_MS ? 0 : n_deaths + 1;
    if (!is_wanted && is_too_many())
        n_deaths = MAX_DEATHS;
    if (is_wanted) {
        take_words(&fallback, command.text, command.length);
        take_words(&command, heir_command.text, heir_command.length);
        worker = heir;
        memset(&heir, 0, sizeof heir);
        snprintf(how, sizeof how, "worker %d was replaced", pid);
    }
    for (; !worker.pid; n_deaths++) {
        if (n_deaths >= MAX_DEATHS && !go_back()) {
            say("%s, and so did too many others; the mount ends", how);
            return 1;
        }
        if (n_deaths > 1)
            wait_ms(PAUSE_MS * (long)n_deaths);
        worker = spawn(&command);
        if (worker.pid)
            break;
    }
    tell_to_go(how);
    return -1;
}

/* Looks for children that have ended, all of their threads. Returns an exit code where the mount ends, else -1. */
static int reap(void)
{
    int status;
    pid_t pid;
    while ((pid = waitpid(-1, &status, WNOHANG)) > 0) {
        int code = WIFSIGNALED(status) ? -WTERMSIG(status) : WEXITSTATUS(status);
        if (pid == heir.pid)
            drop_heir("it died");
        if (pid == worker.pid && (code = bury(code)) >= 0)
            return code;
    }
    /* Without a child there is no worker, however it has ended. */
    return pid < 0 && errno == ECHILD ? 1 : -1;
}

/* For how many milliseconds nothing is to be done unasked; -1: for ever. */
static int time_left(void)
{
    int64_t until = serving_until;
    if (heir.pid && !heir_is_warm && (!until || heir_until < until))
        until = heir_until;
    int64_t left = until - now_ms();
    return !until ? -1 : left < 0 ? 0 : (int)left;
}

static int run(void)
{
    for (;;) {
        int code = reap();
        if (code >= 0)
            return code;
        struct pollfd polled[3] = {
            {.fd = signals, .events = POLLIN},
            {.fd = worker.is_silent ? -1 : worker.sock, .events = POLLIN},
            {.fd = heir.pid && !heir.is_silent ? heir.sock : -1, .events = POLLIN},
        };
        if (poll(polled, 3, time_left()) < 0)
            continue;
        if (polled[0].revents) {
            struct signalfd_siginfo said;
            if (read(signals, &said, sizeof said) == sizeof said && said.ssi_signo != SIGCHLD) {
                is_ending = true;
                forward_end();
            }
        }
        if (polled[1].revents)
            receive(&worker);
        if (polled[2].revents)
            receive(&heir);
        if (heir.pid && !heir_is_warm && now_ms() >= heir_until) {
            kill(heir.pid, SIGKILL);
            drop_heir("it was not ready in time");
        }
        if (serving_until && now_ms() >= serving_until) {
            say("worker %d did not take over in time", (int)worker.pid);
            kill(worker.pid, SIGKILL);
            if (!go_back()) {
                say("the mount ends");
                return 1; /* without waiting for it: it may be one that can't die */
            }
            serving_until = now_ms() + TAKEOVER_LIMIT_MS;
        }
    }
}

/* Keeps the mount of the worker pid; returns the exit code. */
static int keep_mount(int sock, pid_t pid)
{
    fcntl(sock, F_SETFD, FD_CLOEXEC);
    /* These two are blocked since before the worker was forked, so none was missed. What else could end this process is ignored
     * since then. The death of a child is looked for before it is waited for. */
    sigset_t awaited;
    sigemptyset(&awaited);
    sigaddset(&awaited, SIGTERM);
    sigaddset(&awaited, SIGINT);
    sigaddset(&awaited, SIGCHLD);
    sigprocmask(SIG_SETMASK, &awaited, NULL);
    signal(SIGCHLD, SIG_DFL); /* were it ignored, as the command may have been told, nobody could be waited for */
    signals = signalfd(-1, &awaited, SFD_CLOEXEC);
    if (signals < 0)
        return 1; /* the worker goes with this process, and nothing is mounted yet */
    worker = (struct child){.pid = pid, .sock = sock};
    int code = run();
    if (heir.pid)
        kill(heir.pid, SIGKILL);
    return code;
}

/* --- calls that wait for the mount -------------------------------------------------------------------------------- */

static int sync_file(int root, const char *path)
{
    int fd = openat(root, path, O_RDONLY | O_NOFOLLOW | O_CLOEXEC);
    if (fd < 0)
        return errno == ENOENT ? 0 : errno; /* removed meanwhile */
    int error = fdatasync(fd) ? errno : 0;
    close(fd);
    return error;
}

static int sync_files(const char *path)
{
    char *name = NULL;
    size_t room = 0;
    int first = 0;
    int root = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (root < 0)
        return errno;
    while (getdelim(&name, &room, 0, stdin) > 0) {
        int error = sync_file(root, name);
        first = first ? first : error;
    }
    free(name);
    return first ? first : ferror(stdin) ? EIO : 0;
}

static int unmount(const char *path, int flags)
{
    return umount2(path, flags) ? errno : 0;
}

int main(int argc, char **argv)
{
    if (argc == 4 && !strcmp(argv[1], "keep"))
        return keep_mount(atoi(argv[2]), (pid_t)atoi(argv[3]));
    if (argc == 3 && !strcmp(argv[1], "sync"))
        return sync_files(argv[2]);
    if (argc == 4 && !strcmp(argv[1], "umount"))
        return unmount(argv[2], atoi(argv[3]));
    fprintf(stderr, "pbkfs-keeper is for pbkfs itself; see pbkfs --help\n");
    return 255;
}

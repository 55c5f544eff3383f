/* Failure lines into a pipe: see the header. */
#define _GNU_SOURCE
#include "pbk/log.h"

#include <errno.h>
#include <inttypes.h>
#include <limits.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

/* A damaged file is read again and again by a server that retries; this many lines a second are enough to see what is up. */
#define LINES_PER_SECOND 100

int pbk_log_init(struct pbk_log *log, int fd)
{
    memset(log, 0, sizeof(*log));
    log->fd = fd;
    return -pthread_mutex_init(&log->lock, NULL);
}

void pbk_log_destroy(struct pbk_log *log)
{
    pthread_mutex_destroy(&log->lock);
}

static void escape(char *out, size_t room, const char *text)
{
    static const char hex[] = "0123456789abcdef";
    size_t n = 0;
    for (const unsigned char *p = (const unsigned char *)text; *p != '\0'; p++) {
        if (*p > ' ' && *p < 0x7F && *p != '\\') {
            if (n + 1 >= room)
                break;
            out[n++] = (char)*p;
        } else {
            if (n + 4 >= room)
                break;
            out[n++] = '\\';
            out[n++] = 'x';
            out[n++] = hex[*p >> 4];
            out[n++] = hex[*p & 15];
        }
    }
    out[n] = '\0';
}

static void write_line(struct pbk_log *log, const char *line, size_t n)
{
    /* A pipe that polls writable takes PIPE_BUF bytes at once, and nobody else writes while the lock is held. */
    struct pollfd p = {.fd = log->fd, .events = POLLOUT};
    if (log->fd < 0 || n > PIPE_BUF || poll(&p, 1, 0) != 1 || !(p.revents & POLLOUT) || (p.revents & POLLERR)) {
        log->n_suppressed++;
        return;
    }
    if (write(log->fd, line, n) == (ssize_t)n)
        log->n_lines++;
    else
        log->n_suppressed++;
}

void pbk_log_failure(struct pbk_log *log, const char *file, uint64_t block, const char *layer, const char *reason,
                     int error)
{
    char file_text[2048];
    char layer_text[512];
    char block_text[24] = "-";
    char line[PIPE_BUF];
    struct timespec now;

    escape(file_text, sizeof(file_text), file);
    escape(layer_text, sizeof(layer_text), layer);
    if (block != PBK_LOG_NO_BLOCK)
        snprintf(block_text, sizeof(block_text), "%" PRIu64, block);
    const char *name = error ? strerrorname_np(error) : NULL;
    int n = snprintf(line, sizeof(line), "file=%s block=%s layer=%s reason=%s%s%s\n", file_text, block_text, layer_text,
                     reason, name ? ": " : "", name ? name : "");
    if (n < 0 || (size_t)n >= sizeof(line))
        return;

    clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
    pthread_mutex_lock(&log->lock);
    if (now.tv_sec != log->second) {
        log->second = now.tv_sec;
        log->n_in_second = 0;
    }
    if (log->n_in_second < LINES_PER_SECOND) {
        log->n_in_second++;
        write_line(log, line, (size_t)n);
    } else {
        log->n_suppressed++;
    }
    pthread_mutex_unlock(&log->lock);
}

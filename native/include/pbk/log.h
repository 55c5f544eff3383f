/*
 * One text line for every page that could not be read, into a pipe whose other end Python logs:
 *
 *     file=database/base/5/2619 block=12 layer=SBOL94 reason=page does not inflate
 *
 * Never blocks: a line that finds the pipe full, or the budget of the second used up, is counted and left out. Any thread.
 */
#ifndef PBK_LOG_H
#define PBK_LOG_H

#include <pthread.h>
#include <stdint.h>
#include <time.h>

#define PBK_LOG_NO_BLOCK UINT64_MAX

struct pbk_log {
    int fd;               /* -1: lines go nowhere, constant after init */
    pthread_mutex_t lock; /* guards what follows */
    time_t second;
    unsigned n_in_second;
    uint64_t n_lines;
    uint64_t n_suppressed;
};

int pbk_log_init(struct pbk_log *, int fd);
void pbk_log_destroy(struct pbk_log *);

/* file is shown with everything but printable ASCII escaped; reason is lower case, without a full stop. error, if not 0, is a
 * positive errno whose name is appended. */
void pbk_log_failure(struct pbk_log *, const char *file, uint64_t block, const char *layer, const char *reason,
                     int error);

#endif

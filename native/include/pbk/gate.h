/*
 * The gate every change of data passes. Open, it costs two short critical sections; closed, changes wait in front of it, and
 * gate_close returns when the last one that was inside has left. Not tied to a thread: one may close, another open it.
 */
#ifndef PBK_GATE_H
#define PBK_GATE_H

#include <pthread.h>

struct pbk_gate {
    pthread_mutex_t lock; /* guards what follows */
    pthread_cond_t changed;
    unsigned n_closed; /* closes that were not opened again */
    unsigned n_inside;
};

int pbk_gate_init(struct pbk_gate *);
void pbk_gate_destroy(struct pbk_gate *);
void pbk_gate_enter(struct pbk_gate *);
void pbk_gate_leave(struct pbk_gate *);
void pbk_gate_close(struct pbk_gate *);
int pbk_gate_open(struct pbk_gate *); /* -EINVAL if it is open */

#endif

/* The write gate: see the header. */
#include "pbk/gate.h"

#include <errno.h>

int pbk_gate_init(struct pbk_gate *gate)
{
    gate->n_closed = 0;
    gate->n_inside = 0;
    int err = pthread_mutex_init(&gate->lock, NULL);
    if (err)
        return -err;
    err = pthread_cond_init(&gate->changed, NULL);
    if (err)
        pthread_mutex_destroy(&gate->lock);
    return -err;
}

void pbk_gate_destroy(struct pbk_gate *gate)
{
    pthread_cond_destroy(&gate->changed);
    pthread_mutex_destroy(&gate->lock);
}

void pbk_gate_enter(struct pbk_gate *gate)
{
    pthread_mutex_lock(&gate->lock);
    while (gate->n_closed > 0)
        pthread_cond_wait(&gate->changed, &gate->lock);
    gate->n_inside++;
    pthread_mutex_unlock(&gate->lock);
}

void pbk_gate_leave(struct pbk_gate *gate)
{
    pthread_mutex_lock(&gate->lock);
    if (--gate->n_inside == 0 && gate->n_closed > 0)
        pthread_cond_broadcast(&gate->changed);
    pthread_mutex_unlock(&gate->lock);
}

void pbk_gate_close(struct pbk_gate *gate)
{
    pthread_mutex_lock(&gate->lock);
    gate->n_closed++;
    while (gate->n_inside > 0)
        pthread_cond_wait(&gate->changed, &gate->lock);
    pthread_mutex_unlock(&gate->lock);
}

int pbk_gate_open(struct pbk_gate *gate)
{
    pthread_mutex_lock(&gate->lock);
    int err = gate->n_closed > 0 ? 0 : -EINVAL;
    if (err == 0 && --gate->n_closed == 0)
        pthread_cond_broadcast(&gate->changed);
    pthread_mutex_unlock(&gate->lock);
    return err;
}

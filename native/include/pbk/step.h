/*
 * Labelled steps: the places where a process changes the disk or makes it durable, so that a test can list them and end the
 * process at any of them. The label is that of what comes next. While no test has armed them, a step is one branch.
 */
#ifndef PBK_STEP_H
#define PBK_STEP_H

#include <stdatomic.h>
#include <stdbool.h>

#define PBK_STEP_EXIT_CODE 86

extern atomic_bool pbk_steps_armed;

/* Each step that is reached from now on is a line in the file log, and the n-th one (from 1) with the label die_at ends the
 * process at once, by SIGKILL or by _exit(2). Strings are the caller's for good. Before any other thread. */
void pbk_steps_arm(const char *log, const char *die_at, unsigned n, bool by_signal);

void pbk_step_reached(const char *label);

static inline void pbk_step(const char *label)
{
    if (__builtin_expect(atomic_load_explicit(&pbk_steps_armed, memory_order_relaxed), 0))
        pbk_step_reached(label);
}

#endif

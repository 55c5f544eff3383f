"""A mount's life: request, binding, lock, worker process, control socket, statistics."""

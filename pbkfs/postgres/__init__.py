"""PostgreSQL servers on a PGDATA: find the binaries, start safely, recover, stop.

Called by the command line. Knows nothing of mounts: who calls says where a PGDATA's diff is.
"""

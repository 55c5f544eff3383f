"""pbkfs: any PostgreSQL backup or branch is a PGDATA, at once."""

__version__ = "0.1.0"

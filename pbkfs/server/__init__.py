"""The daemon: trunks and branches behind a REST interface (``pbkfs server``)."""

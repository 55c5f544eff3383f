"""Immutable layers and one writable diff, seen as one tree of files."""

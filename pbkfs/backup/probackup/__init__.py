"""Catalogs of pg_probackup, read without pg_probackup.

``control`` and ``content`` parse its files, ``catalog`` and ``chain`` find backups and say which
can be mounted, ``layer``, ``tree`` and ``composition`` make one tree of a chain, ``wal_archive``
and ``guard`` are the store's WAL and locks, ``base`` ties them together.
"""

-- The store of trunks and branches, version 3 (PRAGMA user_version).
--
-- It holds intentions and what can't be read off the disk. What a head consists of (its layers, its
-- base) is in the head's own directory; whether it is mounted and served is the kernel's to say.
-- Times are RFC 3339 in UTC, so that they sort as text.

-- A trunk or a branch: a head of a stack of layers, with a server of its own.
CREATE TABLE heads (
    id              TEXT PRIMARY KEY,            -- uuid; the name of its directories
    name            TEXT NOT NULL UNIQUE,        -- one space of names for trunks and branches
    kind            TEXT NOT NULL CHECK (kind IN ('trunk', 'branch')),
    parent_id       TEXT REFERENCES heads (id) ON UPDATE CASCADE,  -- what it was branched from; NULL for a trunk
    status          TEXT NOT NULL CHECK (status IN
                        ('creating', 'starting', 'running', 'stopped', 'error', 'deleting')),
    operation       TEXT NOT NULL DEFAULT '',    -- what is under way, for whoever has to finish it
    pending_id      TEXT NOT NULL DEFAULT '',    -- of a refresh: the other directory, to be removed
    error           TEXT NOT NULL DEFAULT '',    -- why it is in the state error
    is_wanted       INTEGER NOT NULL DEFAULT 1,  -- whether its server is meant to run
    engine          TEXT NOT NULL,
    source          TEXT NOT NULL DEFAULT '',    -- what a trunk was made from, for people
    point_id        TEXT NOT NULL DEFAULT '',    -- the branch point that a reset goes back to
    port            INTEGER NOT NULL DEFAULT 0,  -- its port; kept while it is stopped, as a wish
    pg_user         TEXT NOT NULL,
    pg_database     TEXT NOT NULL,
    pg_version      TEXT NOT NULL DEFAULT '',
    bindir          TEXT NOT NULL DEFAULT '',    -- where its server's programs are
    wal_level       TEXT NOT NULL DEFAULT '',    -- of a trunk, and of its branches
    auth            TEXT NOT NULL CHECK (auth IN ('password', 'trust')),
    server_pid      INTEGER NOT NULL DEFAULT 0,  -- the postmaster, with its start in clock ticks
    server_ticks    INTEGER NOT NULL DEFAULT 0,
    created_at      TEXT NOT NULL,
    started_at      TEXT,
    expires_at      TEXT,                        -- NULL: never
    idle_stop_s     REAL,                        -- stopped after so long without a client; NULL: never
    is_asleep       INTEGER NOT NULL DEFAULT 0,  -- stopped like that; the daemon starts it for a client
    cpu_limit       REAL,                        -- processors; NULL: as many as there are
    memory_limit_bytes INTEGER                   -- NULL: as much as there is
) STRICT;

CREATE INDEX heads_by_parent ON heads (parent_id);

-- Ports that are taken: by heads that run or are about to.
CREATE TABLE ports (
    port            INTEGER PRIMARY KEY,
    head_id         TEXT NOT NULL UNIQUE REFERENCES heads (id) ON DELETE CASCADE ON UPDATE CASCADE
) STRICT;

CREATE TABLE tags (
    head_id         TEXT NOT NULL REFERENCES heads (id) ON DELETE CASCADE ON UPDATE CASCADE,
    tag             TEXT NOT NULL,
    PRIMARY KEY (head_id, tag)
) STRICT, WITHOUT ROWID;

-- The newest branch point of a head: another branch shares it while the head has not changed.
CREATE TABLE points (
    head_id         TEXT PRIMARY KEY REFERENCES heads (id) ON DELETE CASCADE ON UPDATE CASCADE,
    point_id        TEXT NOT NULL,
    live_uuid       TEXT NOT NULL,               -- the head's live layer since the point was made
    lsn             TEXT NOT NULL,               -- the server's insert position; '' if none ran
    created_at      REAL NOT NULL                -- seconds since the epoch, before the seal
) STRICT;

-- What happened; outlives the head it happened to.
CREATE TABLE events (
    id              INTEGER PRIMARY KEY,
    at              TEXT NOT NULL,
    head_id         TEXT NOT NULL,
    name            TEXT NOT NULL,
    what            TEXT NOT NULL,
    detail          TEXT NOT NULL DEFAULT ''
) STRICT;

CREATE INDEX events_by_head ON events (head_id, id);

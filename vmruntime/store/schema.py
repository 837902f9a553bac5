"""The tables, as a list of migrations: never edit one that was released, append."""

from __future__ import annotations

MIGRATIONS: tuple[str, ...] = (
    """
    CREATE TABLE sandboxes (
        id TEXT PRIMARY KEY,
        name_key TEXT NOT NULL UNIQUE,
        record BLOB NOT NULL
    ) STRICT;
    CREATE TABLE containers (
        id TEXT PRIMARY KEY,
        sandbox_id TEXT NOT NULL REFERENCES sandboxes (id) ON DELETE CASCADE,
        record BLOB NOT NULL
    ) STRICT;
    CREATE INDEX containers_by_sandbox ON containers (sandbox_id);
    CREATE TABLE images (
        id TEXT PRIMARY KEY,
        record BLOB NOT NULL
    ) STRICT;
    CREATE TABLE image_names (
        name TEXT PRIMARY KEY,
        image_id TEXT NOT NULL REFERENCES images (id) ON DELETE CASCADE
    ) STRICT;
    CREATE TABLE layers (
        diff_id TEXT PRIMARY KEY,
        size INTEGER NOT NULL
    ) STRICT;
    CREATE TABLE resources (
        kind TEXT NOT NULL,
        key TEXT NOT NULL,
        owner TEXT NOT NULL,
        record BLOB NOT NULL,
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        UNIQUE (kind, key)
    ) STRICT;
    CREATE TABLE facts (
        name TEXT PRIMARY KEY,
        value BLOB NOT NULL
    ) STRICT;
    """,
)

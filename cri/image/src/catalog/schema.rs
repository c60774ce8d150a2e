//! The tables, and which versions of the program may use them.

use crate::error::{Result, StoreError, sql};
use rusqlite::{Connection, OptionalExtension, Transaction, TransactionBehavior};
use std::path::Path;

/// Marks the file as ours ("Slip").
const APPLICATION: i64 = 0x536c_6970;
/// The schema that this program writes.
pub(super) const SCHEMA: i64 = 1;
/// The oldest program that may read what this one writes.
const READERS_FROM: i64 = 1;
/// The oldest program that may write beside this one.
const WRITERS_FROM: i64 = 1;

const TABLES: &str = "
CREATE TABLE meta (key TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID, STRICT;

-- Who has the store open; alive as long as owners/<id> is locked.
CREATE TABLE owners (
    id TEXT PRIMARY KEY, kind TEXT NOT NULL, pid INTEGER NOT NULL, boot TEXT NOT NULL, since INTEGER NOT NULL,
    estate TEXT
) WITHOUT ROWID, STRICT;

-- owner NULL: persistent.
CREATE TABLE leases (name TEXT PRIMARY KEY, owner TEXT, what TEXT NOT NULL, since INTEGER NOT NULL)
    WITHOUT ROWID, STRICT;
CREATE TABLE lease_items (
    lease TEXT NOT NULL REFERENCES leases(name) ON DELETE CASCADE,
    kind TEXT NOT NULL, item TEXT NOT NULL, PRIMARY KEY (lease, kind, item)
) WITHOUT ROWID, STRICT;
CREATE INDEX leases_owner ON leases(owner);

-- doomed: garbage collection is about to remove the file.
CREATE TABLE blobs (
    digest TEXT PRIMARY KEY, size INTEGER NOT NULL, since INTEGER NOT NULL, doomed INTEGER NOT NULL DEFAULT 0
) WITHOUT ROWID, STRICT;
CREATE TABLE blob_sources (
    digest TEXT NOT NULL, repository TEXT NOT NULL, seen INTEGER NOT NULL, PRIMARY KEY (digest, repository)
) WITHOUT ROWID, STRICT;

-- state: active, committed, doomed. below: the snapshot it was prepared on, when that was no layer yet.
CREATE TABLE snapshots (
    id TEXT PRIMARY KEY, key TEXT UNIQUE, state TEXT NOT NULL, parent TEXT, below TEXT, lease TEXT,
    read_only INTEGER NOT NULL DEFAULT 0, since INTEGER NOT NULL
) WITHOUT ROWID, STRICT;
CREATE INDEX snapshots_lease ON snapshots(lease);
CREATE TABLE layers (
    chain TEXT PRIMARY KEY, diff_id TEXT NOT NULL, parent TEXT, snapshot TEXT NOT NULL,
    bytes INTEGER NOT NULL, inodes INTEGER NOT NULL, tar_bytes INTEGER NOT NULL, options TEXT,
    since INTEGER NOT NULL, doomed INTEGER NOT NULL DEFAULT 0
) WITHOUT ROWID, STRICT;
CREATE INDEX layers_diff ON layers(diff_id);

CREATE TABLE images (
    id TEXT PRIMARY KEY, config BLOB NOT NULL, chain TEXT, manifest TEXT, size INTEGER NOT NULL,
    since INTEGER NOT NULL, built_here INTEGER NOT NULL, pushed INTEGER NOT NULL DEFAULT 0,
    pinned INTEGER NOT NULL DEFAULT 0
) WITHOUT ROWID, STRICT;
CREATE TABLE names (
    name TEXT PRIMARY KEY, image TEXT NOT NULL REFERENCES images(id) ON DELETE CASCADE,
    writer TEXT NOT NULL, since INTEGER NOT NULL
) WITHOUT ROWID, STRICT;
CREATE INDEX names_image ON names(image);
CREATE TABLE repo_digests (
    image TEXT NOT NULL REFERENCES images(id) ON DELETE CASCADE, digest TEXT NOT NULL,
    PRIMARY KEY (image, digest)
) WITHOUT ROWID, STRICT;
CREATE INDEX repo_digests_digest ON repo_digests(digest);
CREATE TABLE manifests (
    image TEXT NOT NULL REFERENCES images(id) ON DELETE CASCADE, digest TEXT NOT NULL,
    media_type TEXT NOT NULL, bytes BLOB NOT NULL, PRIMARY KEY (digest, image)
) WITHOUT ROWID, STRICT;
CREATE INDEX manifests_image ON manifests(image);

-- The blobs that layers were pulled as, and those made here: kept for ever.
CREATE TABLE originals (
    diff_id TEXT NOT NULL, digest TEXT NOT NULL, media_type TEXT NOT NULL, size INTEGER NOT NULL,
    seen INTEGER NOT NULL, PRIMARY KEY (diff_id, digest)
) WITHOUT ROWID, STRICT;
CREATE TABLE variants (
    diff_id TEXT NOT NULL, encoder TEXT NOT NULL, digest TEXT NOT NULL, size INTEGER NOT NULL,
    PRIMARY KEY (diff_id, encoder)
) WITHOUT ROWID, STRICT;

CREATE TABLE cache (
    key TEXT PRIMARY KEY, chain TEXT, value TEXT NOT NULL, since INTEGER NOT NULL, used INTEGER NOT NULL
) WITHOUT ROWID, STRICT;

CREATE TABLE records (
    kind TEXT NOT NULL, id TEXT NOT NULL, name TEXT, json TEXT NOT NULL, since INTEGER NOT NULL,
    PRIMARY KEY (kind, id)
) WITHOUT ROWID, STRICT;
CREATE UNIQUE INDEX records_name ON records(kind, name) WHERE name IS NOT NULL;
";

/// Makes the tables, or checks that this program may use those that are there.
pub(super) fn prepare(connection: &Connection, path: &Path) -> Result<()> {
    let application: i64 = connection
        .pragma_query_value(None, "application_id", |row| row.get(0))
        .map_err(sql("read what kind of database it is"))?;
    if application == APPLICATION {
        return check(connection, path);
    }
    let tables: i64 = connection
        .query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get(0))
        .map_err(sql("read the schema"))?;
    if application != 0 || tables != 0 {
        return Err(StoreError::NotACatalog {
            path: path.to_path_buf(),
        });
    }
    connection
        .pragma_update_and_check(None, "journal_mode", "WAL", |row| row.get::<_, String>(0))
        .map_err(sql("switch the database to WAL"))?;
    let transaction = Transaction::new_unchecked(connection, TransactionBehavior::Immediate)
        .map_err(sql("begin a transaction"))?;
    transaction
        .execute_batch(TABLES)
        .map_err(sql("make the tables"))?;
    for (key, value) in [
        ("schema", SCHEMA),
        ("readers_from", READERS_FROM),
        ("writers_from", WRITERS_FROM),
    ] {
        transaction
            .execute("INSERT INTO meta (key, value) VALUES (?1, ?2)", (key, value))
            .map_err(sql("write the schema's version"))?;
    }
    transaction
        .pragma_update(None, "application_id", APPLICATION)
        .map_err(sql("mark the database as ours"))?;
    transaction.commit().map_err(sql("make the tables"))
}

/// Every opening of ours writes (its own lock at least), so it must be among the writers.
fn check(connection: &Connection, path: &Path) -> Result<()> {
    let meta = |key: &str| -> Result<i64> {
        connection
            .query_row("SELECT value FROM meta WHERE key = ?1", [key], |row| row.get(0))
            .optional()
            .map_err(sql("read the schema's version"))?
            .ok_or_else(|| StoreError::NotACatalog {
                path: path.to_path_buf(),
            })
    };
    let found = meta("schema")?;
    let needs = meta("writers_from")?.max(meta("readers_from")?);
    if needs > SCHEMA {
        return Err(StoreError::SchemaTooNew {
            path: path.to_path_buf(),
            found,
            needs,
            ours: SCHEMA,
        });
    }
    // There is one schema so far: nothing to upgrade.
    Ok(())
}

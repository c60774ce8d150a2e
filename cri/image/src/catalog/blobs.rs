//! Blobs: which files of `content/sha256` are complete, and which repositories are known to have them.

use super::{int, now, uint};
use crate::digest::Digest;
use crate::error::{Result, sql};
use rusqlite::{Connection, OptionalExtension};

/// The size of a blob that is here and not doomed.
pub(crate) fn size(c: &Connection, digest: &Digest) -> Result<Option<u64>> {
    c.query_row(
        "SELECT size FROM blobs WHERE digest = ?1 AND doomed = 0",
        [digest.to_string()],
        |row| row.get(0),
    )
    .optional()
    .map(|size| size.map(uint))
    .map_err(sql("look a blob up"))
}

/// Whether anything is known of a blob, also a doomed one.
pub(crate) fn has_row(c: &Connection, digest: &Digest) -> Result<bool> {
    c.query_row(
        "SELECT count(*) FROM blobs WHERE digest = ?1",
        [digest.to_string()],
        |row| row.get(0),
    )
    .map_err(sql("look a blob up"))
}

/// Records that a blob's file is in its place; also one that was doomed.
pub(crate) fn put(c: &Connection, digest: &Digest, size: u64) -> Result<()> {
    c.execute(
        "INSERT INTO blobs (digest, size, since) VALUES (?1, ?2, ?3)
         ON CONFLICT (digest) DO UPDATE SET size = excluded.size, since = excluded.since, doomed = 0",
        (digest.to_string(), int(size), now()),
    )
    .map_err(sql("add a blob"))?;
    Ok(())
}

pub(crate) fn add_source(c: &Connection, digest: &Digest, repository: &str) -> Result<()> {
    c.execute(
        "INSERT INTO blob_sources (digest, repository, seen) VALUES (?1, ?2, ?3)
         ON CONFLICT (digest, repository) DO UPDATE SET seen = excluded.seen",
        (digest.to_string(), repository, now()),
    )
    .map_err(sql("remember a blob's repository"))?;
    Ok(())
}

/// Newest first, at most 16.
pub(crate) fn sources(c: &Connection, digest: &Digest) -> Result<Vec<String>> {
    let act = "list a blob's repositories";
    let mut statement = c
        .prepare_cached("SELECT repository FROM blob_sources WHERE digest = ?1 ORDER BY seen DESC LIMIT 16")
        .map_err(sql(act))?;
    let rows = statement
        .query_map([digest.to_string()], |row| row.get(0))
        .map_err(sql(act))?;
    rows.collect::<rusqlite::Result<_>>().map_err(sql(act))
}

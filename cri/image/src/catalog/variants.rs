//! The blobs a layer has or had: as it was pulled, and as this node encoded it. Recorded for ever.

use super::{digest, int, now, uint};
use crate::digest::{DiffId, Digest};
use crate::error::{Result, sql};
use rusqlite::{Connection, OptionalExtension};

/// A blob as recorded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct BlobRow {
    pub(crate) digest: Digest,
    pub(crate) size: u64,
}

/// Records a blob that was seen to decode to the layer's tar.
pub(crate) fn add_original(c: &Connection, diff: &DiffId, blob: &BlobRow, media_type: &str) -> Result<()> {
    c.execute(
        "INSERT INTO originals (diff_id, digest, media_type, size, seen) VALUES (?1, ?2, ?3, ?4, ?5)
         ON CONFLICT (diff_id, digest) DO UPDATE SET seen = excluded.seen, media_type = excluded.media_type",
        (
            diff.to_string(),
            blob.digest.to_string(),
            media_type,
            int(blob.size),
            now(),
        ),
    )
    .map_err(sql("record a pulled layer's blob"))?;
    Ok(())
}

/// Whether a blob was seen to decode to the layer's tar, or was made of it here.
pub(crate) fn is_known(c: &Connection, diff: &DiffId, blob: &Digest) -> Result<bool> {
    c.query_row(
        "SELECT EXISTS (SELECT 1 FROM originals WHERE diff_id = ?1 AND digest = ?2)
             OR EXISTS (SELECT 1 FROM variants WHERE diff_id = ?1 AND digest = ?2)",
        (diff.to_string(), blob.to_string()),
        |row| row.get(0),
    )
    .map_err(sql("look for a layer's blob"))
}

/// The blobs a layer was pulled as, those that are here first, then the newest.
pub(crate) fn originals(c: &Connection, diff: &DiffId) -> Result<Vec<(BlobRow, String)>> {
    let act = "list a pulled layer's blobs";
    let mut statement = c
        .prepare_cached(
            "SELECT o.digest, o.size, o.media_type FROM originals o
             LEFT JOIN blobs b ON b.digest = o.digest AND b.doomed = 0
             WHERE o.diff_id = ?1 ORDER BY b.digest IS NULL, o.seen DESC",
        )
        .map_err(sql(act))?;
    let rows = statement
        .query_map([diff.to_string()], |row| {
            Ok((
                row.get::<_, String>(0)?,
                row.get::<_, i64>(1)?,
                row.get::<_, String>(2)?,
            ))
        })
        .map_err(sql(act))?;
    rows.map(|row| {
        let (blob, size, media_type) = row.map_err(sql(act))?;
        Ok((
            BlobRow {
                digest: digest(&blob)?,
                size: uint(size),
            },
            media_type,
        ))
    })
    .collect()
}

pub(crate) fn get(c: &Connection, diff: &DiffId, encoder: &str) -> Result<Option<BlobRow>> {
    let row: Option<(String, i64)> = c
        .query_row(
            "SELECT digest, size FROM variants WHERE diff_id = ?1 AND encoder = ?2",
            (diff.to_string(), encoder),
            |row| Ok((row.get(0)?, row.get(1)?)),
        )
        .optional()
        .map_err(sql("look a layer's variant up"))?;
    row.map(|(blob, size)| {
        Ok(BlobRow {
            digest: digest(&blob)?,
            size: uint(size),
        })
    })
    .transpose()
}

/// The encoder that made a blob of a layer here, where one did.
pub(crate) fn encoder_of(c: &Connection, diff: &DiffId, blob: &Digest) -> Result<Option<String>> {
    c.query_row(
        "SELECT encoder FROM variants WHERE diff_id = ?1 AND digest = ?2 LIMIT 1",
        (diff.to_string(), blob.to_string()),
        |row| row.get(0),
    )
    .optional()
    .map_err(sql("look for who made a layer's blob"))
}

/// Records a variant; what was recorded first stays.
pub(crate) fn put(c: &Connection, diff: &DiffId, encoder: &str, blob: &BlobRow) -> Result<()> {
    c.execute(
        "INSERT INTO variants (diff_id, encoder, digest, size) VALUES (?1, ?2, ?3, ?4) ON CONFLICT DO NOTHING",
        (diff.to_string(), encoder, blob.digest.to_string(), int(blob.size)),
    )
    .map_err(sql("record a layer's variant"))?;
    Ok(())
}

//! Marking what nobody needs: one transaction, the whole catalog.
//!
//! Roots: images, what leases hold, the parents of active snapshots, cache entries. A layer needs those below it; a
//! blob is needed while a layer that it encodes is: of those it came as, the ones that manifests of images name, or else
//! the newest. An active snapshot needs the snapshots it was prepared on.

use super::{digest, uint};
use crate::digest::Digest;
use crate::error::{Result, sql};
use rusqlite::{Connection, params_from_iter};

/// What becomes of blobs that were made here.
#[derive(Debug)]
pub(crate) enum Variants {
    /// They stay as long as their layer.
    Keep,
    /// They go, but for those that an image's manifest names and none of these encoders makes again.
    MadeAgainBy(Vec<String>),
}

/// What is doomed after a mark.
#[derive(Debug, Default)]
pub(crate) struct Doomed {
    pub(crate) blobs: Vec<(Digest, u64)>,
    pub(crate) layer_bytes: u64,
}

const MARK_LAYERS: &str = "
WITH RECURSIVE
under(id) AS (
    SELECT id FROM snapshots WHERE state = 'active'
    UNION SELECT s.below FROM snapshots s JOIN under u ON s.id = u.id WHERE s.below IS NOT NULL
),
needed(chain) AS (
    SELECT chain FROM images WHERE chain IS NOT NULL
    UNION SELECT item FROM lease_items WHERE kind = 'layer'
    UNION SELECT i.chain FROM lease_items l JOIN images i ON i.id = l.item
        WHERE l.kind = 'image' AND i.chain IS NOT NULL
    UNION SELECT s.parent FROM snapshots s JOIN under u ON s.id = u.id WHERE s.parent IS NOT NULL
    UNION SELECT chain FROM cache WHERE chain IS NOT NULL
    UNION SELECT l.parent FROM layers l JOIN needed n ON l.chain = n.chain WHERE l.parent IS NOT NULL
)
UPDATE layers SET doomed = 1 WHERE doomed = 0 AND chain NOT IN needed";

const MARK_SNAPSHOTS: &str = "
WITH RECURSIVE below(id) AS (
    SELECT below FROM snapshots WHERE state = 'active' AND below IS NOT NULL
    UNION SELECT s.below FROM snapshots s JOIN below b ON s.id = b.id WHERE s.below IS NOT NULL
)
UPDATE snapshots SET state = 'doomed', key = NULL
WHERE state = 'committed' AND id NOT IN below
  AND id NOT IN (SELECT snapshot FROM layers WHERE doomed = 0)";

/// A layer outlives its image where others are built on it, and then one of its blobs has to be left for their push.
const MARK_BLOBS: &str = "
WITH
named(digest) AS (
    SELECT json_extract(l.value, '$.digest') FROM manifests m,
        json_each(iif(json_valid(CAST(m.bytes AS TEXT)), CAST(m.bytes AS TEXT), '{}'), '$.layers') l
    WHERE l.type = 'object' AND json_type(l.value, '$.digest') = 'text'
),
here(diff_id, digest, named, seen) AS (
    SELECT o.diff_id, o.digest, o.digest IN named, o.seen FROM originals o
    JOIN blobs b ON b.digest = o.digest AND b.doomed = 0
    WHERE o.diff_id IN (SELECT diff_id FROM layers WHERE doomed = 0)
),
ranked(digest, named, rank) AS (
    SELECT digest, named, row_number() OVER (PARTITION BY diff_id ORDER BY named DESC, seen DESC, digest) FROM here
),
needed(digest) AS (SELECT digest FROM ranked WHERE named OR rank = 1)
UPDATE blobs SET doomed = 1 WHERE doomed = 0
  AND digest NOT IN (SELECT item FROM lease_items WHERE kind = 'blob')
  AND digest NOT IN needed";

const KEEP_VARIANTS: &str = "  AND digest NOT IN (SELECT v.digest FROM variants v JOIN layers l ON l.diff_id = v.diff_id WHERE l.doomed = 0)";

/// A pulled image may name a blob that another version of the encoder made here, or that was made of a layer whose options
/// went with it. It came from a registry then, and is no original of the layer, since nobody had to look into it.
const KEEP_LAST_VARIANTS: &str =
    "  AND digest NOT IN (SELECT v.digest FROM variants v JOIN layers l ON l.diff_id = v.diff_id
      WHERE l.doomed = 0 AND v.digest IN named
        AND (l.options IS NULL OR v.encoder NOT IN (SELECT value FROM json_each(?1))))";

/// Dooms what is not needed.
pub(crate) fn mark(c: &Connection, variants: &Variants) -> Result<Doomed> {
    let act = "mark what nobody needs";
    c.execute(MARK_LAYERS, []).map_err(sql(act))?;
    c.execute(MARK_SNAPSHOTS, []).map_err(sql(act))?;
    let (keep, encoders) = match variants {
        Variants::Keep => (KEEP_VARIANTS, None),
        Variants::MadeAgainBy(encoders) => (
            KEEP_LAST_VARIANTS,
            Some(serde_json::Value::from(encoders.as_slice()).to_string()),
        ),
    };
    let blobs = format!("{MARK_BLOBS}\n{keep}");
    c.execute(&blobs, params_from_iter(encoders)).map_err(sql(act))?;
    doomed(c)
}

/// What is doomed now, also by a collection that somebody's death interrupted.
pub(crate) fn doomed(c: &Connection) -> Result<Doomed> {
    let act = "list what is doomed";
    let mut statement = c
        .prepare_cached("SELECT digest, size FROM blobs WHERE doomed = 1")
        .map_err(sql(act))?;
    let rows = statement
        .query_map([], |row| Ok((row.get::<_, String>(0)?, row.get::<_, i64>(1)?)))
        .map_err(sql(act))?;
    let blobs = rows
        .map(|row| {
            let (blob, size) = row.map_err(sql(act))?;
            Ok((digest(&blob)?, uint(size)))
        })
        .collect::<Result<_>>()?;
    let layer_bytes: i64 = c
        .query_row(
            "SELECT coalesce(sum(bytes), 0) FROM layers WHERE doomed = 1",
            [],
            |row| row.get(0),
        )
        .map_err(sql(act))?;
    Ok(Doomed {
        blobs,
        layer_bytes: uint(layer_bytes),
    })
}

/// Whether a blob is still doomed: it may have come again meanwhile.
pub(crate) fn is_doomed(c: &Connection, blob: &Digest) -> Result<bool> {
    c.query_row(
        "SELECT count(*) FROM blobs WHERE digest = ?1 AND doomed = 1",
        [blob.to_string()],
        |row| row.get(0),
    )
    .map_err(sql("look a doomed blob up"))
}

pub(crate) fn delete_blob(c: &Connection, blob: &Digest) -> Result<()> {
    c.execute(
        "DELETE FROM blobs WHERE digest = ?1 AND doomed = 1",
        [blob.to_string()],
    )
    .map_err(sql("forget a blob"))?;
    Ok(())
}

pub(crate) fn delete_layers(c: &Connection) -> Result<()> {
    c.execute("DELETE FROM layers WHERE doomed = 1", [])
        .map_err(sql("forget layers"))?;
    Ok(())
}

/// Every blob that has a row.
pub(crate) fn all_blobs(c: &Connection) -> Result<std::collections::HashSet<String>> {
    let act = "list the blobs";
    let mut statement = c.prepare_cached("SELECT digest FROM blobs").map_err(sql(act))?;
    let rows = statement.query_map([], |row| row.get(0)).map_err(sql(act))?;
    rows.collect::<rusqlite::Result<_>>().map_err(sql(act))
}

/// Bytes of all blobs.
pub(crate) fn blob_bytes(c: &Connection) -> Result<(u64, u64)> {
    c.query_row("SELECT coalesce(sum(size), 0), count(*) FROM blobs", [], |row| {
        Ok((uint(row.get(0)?), uint(row.get(1)?)))
    })
    .map_err(sql("add the blobs up"))
}

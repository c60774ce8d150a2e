//! Images, their names, repository digests and manifests.

use super::{int, now, typed, uint};
use crate::digest::{ChainId, Digest, ImageId};
use crate::error::{Result, sql};
use crate::image::Writer;
use rusqlite::{Connection, OptionalExtension, Row};

/// An image's row with what hangs on it.
pub(crate) struct ImageRow {
    pub(crate) id: ImageId,
    pub(crate) config: Vec<u8>,
    pub(crate) chain: Option<ChainId>,
    pub(crate) manifest: Option<Digest>,
    pub(crate) size: u64,
    pub(crate) since: i64,
    pub(crate) built_here: bool,
    pub(crate) pushed: bool,
    pub(crate) pinned: bool,
    pub(crate) names: Vec<String>,
    pub(crate) repo_digests: Vec<String>,
}

/// What of an image is written at its commit.
pub(crate) struct NewRow<'a> {
    pub(crate) id: &'a ImageId,
    pub(crate) config: &'a [u8],
    pub(crate) chain: Option<&'a ChainId>,
    pub(crate) size: u64,
    pub(crate) built_here: bool,
}

const COLUMNS: &str = "id, config, chain, manifest, size, since, built_here, pushed, pinned";

type Raw = (
    String,
    Vec<u8>,
    Option<String>,
    Option<String>,
    i64,
    i64,
    bool,
    bool,
    bool,
);

fn raw(row: &Row<'_>) -> rusqlite::Result<Raw> {
    Ok((
        row.get(0)?,
        row.get(1)?,
        row.get(2)?,
        row.get(3)?,
        row.get(4)?,
        row.get(5)?,
        row.get(6)?,
        row.get(7)?,
        row.get(8)?,
    ))
}

fn parse(c: &Connection, raw: Raw) -> Result<ImageRow> {
    let (id, config, chain, manifest, size, since, built_here, pushed, pinned) = raw;
    let names = texts(c, "SELECT name FROM names WHERE image = ?1 ORDER BY name", &id)?;
    let repo_digests = texts(
        c,
        "SELECT digest FROM repo_digests WHERE image = ?1 ORDER BY digest",
        &id,
    )?;
    Ok(ImageRow {
        id: typed("image id", &id)?,
        config,
        chain: chain.map(|chain| typed("chain", &chain)).transpose()?,
        manifest: manifest.map(|digest| super::digest(&digest)).transpose()?,
        size: uint(size),
        since,
        built_here,
        pushed,
        pinned,
        names,
        repo_digests,
    })
}

fn texts(c: &Connection, query: &str, key: &str) -> Result<Vec<String>> {
    let act = "read what hangs on an image";
    let mut statement = c.prepare_cached(query).map_err(sql(act))?;
    let rows = statement.query_map([key], |row| row.get(0)).map_err(sql(act))?;
    rows.collect::<rusqlite::Result<_>>().map_err(sql(act))
}

pub(crate) fn get(c: &Connection, id: &ImageId) -> Result<Option<ImageRow>> {
    let mut statement = c
        .prepare_cached(&format!("SELECT {COLUMNS} FROM images WHERE id = ?1"))
        .map_err(sql("look an image up"))?;
    let row = statement
        .query_row([id.to_string()], raw)
        .optional()
        .map_err(sql("look an image up"))?;
    row.map(|row| parse(c, row)).transpose()
}

/// Newest first.
pub(crate) fn all(c: &Connection) -> Result<Vec<ImageRow>> {
    let act = "list the images";
    let mut statement = c
        .prepare_cached(&format!("SELECT {COLUMNS} FROM images ORDER BY since DESC, id"))
        .map_err(sql(act))?;
    let rows = statement.query_map([], raw).map_err(sql(act))?;
    rows.map(|row| parse(c, row.map_err(sql(act))?)).collect()
}

fn one_id(c: &Connection, query: &str, key: &str) -> Result<Option<ImageId>> {
    let mut statement = c.prepare_cached(query).map_err(sql("look an image up"))?;
    let id: Option<String> = statement
        .query_row([key], |row| row.get(0))
        .optional()
        .map_err(sql("look an image up"))?;
    id.map(|id| typed("image id", &id)).transpose()
}

pub(crate) fn by_name(c: &Connection, name: &str) -> Result<Option<ImageId>> {
    one_id(c, "SELECT image FROM names WHERE name = ?1", name)
}

/// The images of a repository digest, newest first: an index has one for each platform. At most 50.
pub(crate) fn by_repo_digest(c: &Connection, digest: &str) -> Result<Vec<ImageId>> {
    let act = "look an image up";
    let mut statement = c
        .prepare_cached(
            "SELECT r.image FROM repo_digests r JOIN images i ON i.id = r.image WHERE r.digest = ?1
             ORDER BY i.since DESC, i.id LIMIT 50",
        )
        .map_err(sql(act))?;
    let rows = statement
        .query_map([digest], |row| row.get::<_, String>(0))
        .map_err(sql(act))?;
    rows.map(|row| typed("image id", &row.map_err(sql(act))?))
        .collect()
}

/// Images whose id starts with these digits; at most 20.
pub(crate) fn by_prefix(c: &Connection, digits: &str) -> Result<Vec<ImageId>> {
    let act = "look an image up";
    // 'g' follows the last hexadecimal digit.
    let (from, to) = (format!("sha256:{digits}"), format!("sha256:{digits}g"));
    let mut statement = c
        .prepare_cached("SELECT id FROM images WHERE id >= ?1 AND id < ?2 LIMIT 20")
        .map_err(sql(act))?;
    let rows = statement
        .query_map([from, to], |row| row.get::<_, String>(0))
        .map_err(sql(act))?;
    rows.map(|row| typed("image id", &row.map_err(sql(act))?))
        .collect()
}

/// Adds an image; one that is there keeps its pin, and its age unless it was built anew: a build that is nowhere else
/// counts as pinned from then on.
pub(crate) fn put(c: &Connection, new: &NewRow<'_>) -> Result<()> {
    c.execute(
        "INSERT INTO images (id, config, chain, size, since, built_here) VALUES (?1, ?2, ?3, ?4, ?5, ?6)
         ON CONFLICT (id) DO UPDATE SET size = excluded.size, built_here = max(built_here, excluded.built_here),
             since = CASE WHEN excluded.built_here THEN excluded.since ELSE since END",
        (
            new.id.to_string(),
            new.config,
            new.chain.map(ToString::to_string),
            int(new.size),
            now(),
            new.built_here,
        ),
    )
    .map_err(sql("add an image"))?;
    Ok(())
}

pub(crate) fn name(c: &Connection, id: &ImageId, name: &str, by: Writer) -> Result<()> {
    c.execute(
        "INSERT INTO names (name, image, writer, since) VALUES (?1, ?2, ?3, ?4)
         ON CONFLICT (name) DO UPDATE SET image = excluded.image, writer = excluded.writer, since = excluded.since",
        (name, id.to_string(), by.to_string(), now()),
    )
    .map_err(sql("name an image"))?;
    Ok(())
}

pub(crate) fn unname(c: &Connection, name: &str) -> Result<bool> {
    let gone = c
        .execute("DELETE FROM names WHERE name = ?1", [name])
        .map_err(sql("take a name away"))?;
    Ok(gone == 1)
}

pub(crate) fn writer(c: &Connection, name: &str) -> Result<Option<(Writer, i64)>> {
    let row: Option<(String, i64)> = c
        .query_row("SELECT writer, since FROM names WHERE name = ?1", [name], |row| {
            Ok((row.get(0)?, row.get(1)?))
        })
        .optional()
        .map_err(sql("look a name up"))?;
    row.map(|(writer, since)| Ok((typed("writer of a name", &writer)?, since)))
        .transpose()
}

pub(crate) fn add_repo_digest(c: &Connection, id: &ImageId, digest: &str) -> Result<()> {
    c.execute(
        "INSERT INTO repo_digests (image, digest) VALUES (?1, ?2) ON CONFLICT DO NOTHING",
        (id.to_string(), digest),
    )
    .map_err(sql("add a repository digest"))?;
    Ok(())
}

/// Keeps a manifest and makes it the image's.
pub(crate) fn add_manifest(
    c: &Connection,
    id: &ImageId,
    digest: &Digest,
    media_type: &str,
    bytes: &[u8],
) -> Result<()> {
    c.execute(
        "INSERT INTO manifests (image, digest, media_type, bytes) VALUES (?1, ?2, ?3, ?4) ON CONFLICT DO NOTHING",
        (id.to_string(), digest.to_string(), media_type, bytes),
    )
    .map_err(sql("add a manifest"))?;
    c.execute(
        "UPDATE images SET manifest = ?2 WHERE id = ?1",
        (id.to_string(), digest.to_string()),
    )
    .map_err(sql("add a manifest"))?;
    Ok(())
}

pub(crate) fn manifest(c: &Connection, digest: &Digest) -> Result<Option<(Vec<u8>, String)>> {
    c.query_row(
        "SELECT bytes, media_type FROM manifests WHERE digest = ?1 LIMIT 1",
        [digest.to_string()],
        |row| Ok((row.get(0)?, row.get(1)?)),
    )
    .optional()
    .map_err(sql("look a manifest up"))
}

/// Sets one of the flags of an image; `false` when there is no such image.
#[cfg(test)]
pub(crate) fn set_pinned(c: &Connection, id: &ImageId, pinned: bool) -> Result<bool> {
    let changed = c
        .execute(
            "UPDATE images SET pinned = ?2 WHERE id = ?1",
            (id.to_string(), pinned),
        )
        .map_err(sql("pin an image"))?;
    Ok(changed == 1)
}

pub(crate) fn set_pushed(c: &Connection, id: &ImageId) -> Result<bool> {
    let changed = c
        .execute("UPDATE images SET pushed = 1 WHERE id = ?1", [id.to_string()])
        .map_err(sql("record a push"))?;
    Ok(changed == 1)
}

/// Removes the builds that nobody can mean any more: without a name, not pinned, in no registry and in nobody's use.
/// Their ids.
pub(crate) fn delete_unnamed_builds(c: &Connection) -> Result<Vec<ImageId>> {
    let act = "remove builds without a name";
    let mut statement = c
        .prepare_cached(
            "DELETE FROM images WHERE built_here = 1 AND pinned = 0
               AND NOT EXISTS (SELECT 1 FROM names n WHERE n.image = images.id)
               AND NOT EXISTS (SELECT 1 FROM repo_digests r WHERE r.image = images.id)
               AND NOT EXISTS (SELECT 1 FROM lease_items l WHERE l.kind = 'image' AND l.item = images.id)
             RETURNING id",
        )
        .map_err(sql(act))?;
    let rows = statement
        .query_map([], |row| row.get::<_, String>(0))
        .map_err(sql(act))?;
    rows.map(|row| typed("image id", &row.map_err(sql(act))?))
        .collect()
}

pub(crate) fn delete(c: &Connection, id: &ImageId) -> Result<bool> {
    let gone = c
        .execute("DELETE FROM images WHERE id = ?1", [id.to_string()])
        .map_err(sql("remove an image"))?;
    Ok(gone == 1)
}

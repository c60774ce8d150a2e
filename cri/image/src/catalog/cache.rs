//! The build cache: what a step's key led to.

use super::{digest, now, time, typed, uint};
use crate::digest::{ChainId, Digest};
use crate::error::{Result, sql};
use crate::store::CacheEntry;
use rusqlite::{Connection, OptionalExtension};

pub(crate) fn get(c: &Connection, key: &Digest) -> Result<Option<CacheEntry>> {
    type Raw = (Option<String>, String, i64, i64);
    let row: Option<Raw> = c
        .query_row(
            "SELECT chain, value, since, used FROM cache WHERE key = ?1",
            [key.to_string()],
            |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?)),
        )
        .optional()
        .map_err(sql("look a cache entry up"))?;
    row.map(|(chain, value, since, used)| {
        let chain = chain.map(|chain| typed("chain", &chain)).transpose()?;
        Ok(CacheEntry {
            key: *key,
            chain,
            value,
            created_at: time(since),
            used_at: time(used),
        })
    })
    .transpose()
}

pub(crate) fn touch(c: &Connection, key: &Digest) -> Result<()> {
    c.execute(
        "UPDATE cache SET used = ?2 WHERE key = ?1",
        (key.to_string(), now()),
    )
    .map_err(sql("mark a cache entry as used"))?;
    Ok(())
}

pub(crate) fn put(c: &Connection, key: &Digest, chain: Option<&ChainId>, value: &str) -> Result<()> {
    c.execute(
        "INSERT INTO cache (key, chain, value, since, used) VALUES (?1, ?2, ?3, ?4, ?4)
         ON CONFLICT (key) DO UPDATE SET chain = excluded.chain, value = excluded.value, since = excluded.since,
             used = excluded.used",
        (key.to_string(), chain.map(ToString::to_string), value, now()),
    )
    .map_err(sql("add a cache entry"))?;
    Ok(())
}

pub(crate) fn delete(c: &Connection, key: &Digest) -> Result<u64> {
    let gone = c
        .execute("DELETE FROM cache WHERE key = ?1", [key.to_string()])
        .map_err(sql("forget a cache entry"))?;
    Ok(gone as u64)
}

/// Forgets what was not found since a time.
pub(crate) fn delete_unused(c: &Connection, before: i64) -> Result<u64> {
    let gone = c
        .execute("DELETE FROM cache WHERE used < ?1", [before])
        .map_err(sql("forget cache entries"))?;
    Ok(gone as u64)
}

/// The entry that was found longest ago.
pub(crate) fn oldest(c: &Connection) -> Result<Option<Digest>> {
    let key: Option<String> = c
        .query_row("SELECT key FROM cache ORDER BY used, key LIMIT 1", [], |row| {
            row.get(0)
        })
        .optional()
        .map_err(sql("look for the oldest cache entry"))?;
    key.map(|key| digest(&key)).transpose()
}

/// Bytes of layers that only the cache keeps.
pub(crate) fn own_bytes(c: &Connection) -> Result<u64> {
    let bytes: i64 = c
        .query_row(
            "WITH RECURSIVE
               cached(chain) AS (SELECT chain FROM cache WHERE chain IS NOT NULL
                   UNION SELECT l.parent FROM layers l JOIN cached k ON l.chain = k.chain WHERE l.parent IS NOT NULL),
               wanted(chain) AS (SELECT chain FROM images WHERE chain IS NOT NULL
                   UNION SELECT parent FROM snapshots WHERE state = 'active' AND parent IS NOT NULL
                   UNION SELECT l.parent FROM layers l JOIN wanted w ON l.chain = w.chain WHERE l.parent IS NOT NULL)
             SELECT coalesce(sum(bytes), 0) FROM layers
             WHERE doomed = 0 AND chain IN cached AND chain NOT IN wanted",
            [],
            |row| row.get(0),
        )
        .map_err(sql("add the cache up"))?;
    Ok(uint(bytes))
}

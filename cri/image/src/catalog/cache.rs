//! The build cache: what a step's key led to.

use super::{digest, now, time, typed, uint};
use crate::digest::{ChainId, Digest};
use crate::error::{Result, sql};
use crate::store::CacheEntry;
use rusqlite::{Connection, OptionalExtension};
use std::collections::HashMap;

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

/// Forgets an entry, unless it was found again since this time.
pub(crate) fn delete_unless_used(c: &Connection, key: &Digest, since: i64) -> Result<u64> {
    let gone = c
        .execute(
            "DELETE FROM cache WHERE key = ?1 AND used <= ?2",
            (key.to_string(), since),
        )
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

/// The entries that have to go until the layers that only the cache keeps take no more than so many bytes, with when each
/// was found last: the oldest first, and none that keeps no such layer.
pub(crate) fn beyond(c: &Connection, limit: u64) -> Result<Vec<(Digest, i64)>> {
    let mut own = own_layers(c)?;
    let mut bytes: u64 = own.values().map(|layer| layer.bytes).sum();
    let entries = entries(c)?;
    for (_, chain, _) in &entries {
        if let Some(layer) = own.get_mut(chain) {
            layer.needed_by += 1;
        }
    }
    let parents: Vec<String> = own.values().filter_map(|layer| layer.parent.clone()).collect();
    for parent in parents {
        if let Some(layer) = own.get_mut(&parent) {
            layer.needed_by += 1;
        }
    }
    let mut gone = Vec::new();
    for (key, chain, used) in entries {
        if bytes <= limit {
            break;
        }
        if !own.contains_key(&chain) {
            continue;
        }
        gone.push((digest(&key)?, used));
        let mut at = Some(chain);
        while let Some(chain) = at.take() {
            let Some(layer) = own.get_mut(&chain) else { break };
            layer.needed_by -= 1;
            if layer.needed_by == 0 {
                bytes -= layer.bytes;
                at = own.remove(&chain).and_then(|layer| layer.parent);
            }
        }
    }
    Ok(gone)
}

/// A layer that only the cache keeps.
struct OwnLayer {
    parent: Option<String>,
    bytes: u64,
    /// Entries of it, and own layers on it.
    needed_by: u64,
}

fn own_layers(c: &Connection) -> Result<HashMap<String, OwnLayer>> {
    let act = "add the cache up";
    let mut statement = c
        .prepare_cached(
            "WITH RECURSIVE
               cached(chain) AS (SELECT chain FROM cache WHERE chain IS NOT NULL
                   UNION SELECT l.parent FROM layers l JOIN cached k ON l.chain = k.chain WHERE l.parent IS NOT NULL),
               wanted(chain) AS (SELECT chain FROM images WHERE chain IS NOT NULL
                   UNION SELECT parent FROM snapshots WHERE state = 'active' AND parent IS NOT NULL
                   UNION SELECT l.parent FROM layers l JOIN wanted w ON l.chain = w.chain WHERE l.parent IS NOT NULL)
             SELECT chain, parent, bytes FROM layers
             WHERE doomed = 0 AND chain IN cached AND chain NOT IN wanted",
        )
        .map_err(sql(act))?;
    let rows = statement
        .query_map([], |row| {
            let layer = OwnLayer {
                parent: row.get(1)?,
                bytes: uint(row.get(2)?),
                needed_by: 0,
            };
            Ok((row.get(0)?, layer))
        })
        .map_err(sql(act))?;
    rows.collect::<rusqlite::Result<_>>().map_err(sql(act))
}

/// Key, chain and last use of those that have a chain, the oldest first.
fn entries(c: &Connection) -> Result<Vec<(String, String, i64)>> {
    let act = "list the build cache";
    let mut statement = c
        .prepare_cached("SELECT key, chain, used FROM cache WHERE chain IS NOT NULL ORDER BY used, key")
        .map_err(sql(act))?;
    let rows = statement
        .query_map([], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))
        .map_err(sql(act))?;
    rows.collect::<rusqlite::Result<_>>().map_err(sql(act))
}

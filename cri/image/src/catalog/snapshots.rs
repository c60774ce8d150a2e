//! Snapshots: which directories there are, for whom, and what lies below them.

use super::{layers, now, time, typed};
use crate::digest::ChainId;
use crate::error::{Result, sql};
use crate::store::ActiveInfo;
use rusqlite::{Connection, OptionalExtension, Row};
use slipway_snapshot::SnapshotId;

/// A snapshot's row.
pub(crate) struct SnapshotRow {
    pub(crate) id: SnapshotId,
    pub(crate) parent: Option<ChainId>,
    pub(crate) below: Option<SnapshotId>,
    pub(crate) read_only: bool,
}

/// A snapshot to be made.
pub(crate) struct NewSnapshot<'a> {
    pub(crate) id: &'a SnapshotId,
    pub(crate) key: Option<&'a str>,
    pub(crate) parent: Option<&'a ChainId>,
    pub(crate) below: Option<&'a SnapshotId>,
    pub(crate) lease: &'a str,
    pub(crate) read_only: bool,
}

const COLUMNS: &str = "id, parent, below, read_only";

type Raw = (String, Option<String>, Option<String>, bool);

fn raw(row: &Row<'_>) -> rusqlite::Result<Raw> {
    Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?))
}

fn parse((id, parent, below, read_only): Raw) -> Result<SnapshotRow> {
    Ok(SnapshotRow {
        id: self::id(&id)?,
        parent: parent.map(|chain| typed("chain", &chain)).transpose()?,
        below: below.map(|id| self::id(&id)).transpose()?,
        read_only,
    })
}

pub(crate) fn id(text: &str) -> Result<SnapshotId> {
    SnapshotId::new(text).map_err(crate::error::snap("read a snapshot's name in the catalog"))
}

/// Adds an active snapshot; `false` when its key is taken.
pub(crate) fn add(c: &Connection, new: &NewSnapshot<'_>) -> Result<bool> {
    let added = c
        .execute(
            "INSERT INTO snapshots (id, key, state, parent, below, lease, read_only, since)
             VALUES (?1, ?2, 'active', ?3, ?4, ?5, ?6, ?7) ON CONFLICT (key) DO NOTHING",
            (
                new.id.as_str(),
                new.key,
                new.parent.map(ToString::to_string),
                new.below.map(SnapshotId::as_str),
                new.lease,
                new.read_only,
                now(),
            ),
        )
        .map_err(sql("add a snapshot"))?;
    Ok(added == 1)
}

pub(crate) fn by_key(c: &Connection, key: &str) -> Result<Option<SnapshotRow>> {
    let query = format!("SELECT {COLUMNS} FROM snapshots WHERE key = ?1 AND state = 'active'");
    c.query_row(&query, [key], raw)
        .optional()
        .map_err(sql("look a snapshot up"))?
        .map(parse)
        .transpose()
}

pub(crate) fn by_id(c: &Connection, id: &SnapshotId) -> Result<Option<SnapshotRow>> {
    let query = format!("SELECT {COLUMNS} FROM snapshots WHERE id = ?1 AND state <> 'doomed'");
    c.query_row(&query, [id.as_str()], raw)
        .optional()
        .map_err(sql("look a snapshot up"))?
        .map(parse)
        .transpose()
}

/// The snapshots below one, nearest first; `None` when a layer among them is gone.
pub(crate) fn lower(c: &Connection, row: &SnapshotRow) -> Result<Option<Vec<SnapshotId>>> {
    let mut found = Vec::new();
    let (mut parent, mut below) = (row.parent, row.below.clone());
    while let Some(id) = below {
        let Some(next) = by_id(c, &id)? else {
            return Ok(None);
        };
        found.push(id);
        (parent, below) = (next.parent, next.below);
    }
    if let Some(chain) = parent {
        let Some(rest) = layers::chain(c, &chain)? else {
            return Ok(None);
        };
        found.extend(rest.into_iter().map(|layer| layer.snapshot));
    }
    Ok(Some(found))
}

/// Turns an active snapshot into a committed one; `false` when it is no longer active.
pub(crate) fn commit(c: &Connection, id: &SnapshotId) -> Result<bool> {
    let changed = c
        .execute(
            "UPDATE snapshots SET state = 'committed', key = NULL, lease = NULL WHERE id = ?1 AND state = 'active'",
            [id.as_str()],
        )
        .map_err(sql("commit a snapshot"))?;
    Ok(changed == 1)
}

/// Takes a snapshot's key away and marks it for removal; its id.
pub(crate) fn doom_key(c: &Connection, key: &str) -> Result<Option<SnapshotId>> {
    let id: Option<String> = c
        .query_row(
            "UPDATE snapshots SET state = 'doomed', key = NULL WHERE key = ?1 AND state = 'active' RETURNING id",
            [key],
            |row| row.get(0),
        )
        .optional()
        .map_err(sql("doom a snapshot"))?;
    id.map(|id| self::id(&id)).transpose()
}

/// Marks an active snapshot for removal; `false` when it is not active any more.
pub(crate) fn doom(c: &Connection, id: &SnapshotId) -> Result<bool> {
    let changed = c
        .execute(
            "UPDATE snapshots SET state = 'doomed', key = NULL WHERE id = ?1 AND state = 'active'",
            [id.as_str()],
        )
        .map_err(sql("doom a snapshot"))?;
    Ok(changed == 1)
}

/// Forgets a doomed snapshot whose directory is gone.
pub(crate) fn delete_doomed(c: &Connection, id: &SnapshotId) -> Result<()> {
    c.execute(
        "DELETE FROM snapshots WHERE id = ?1 AND state = 'doomed'",
        [id.as_str()],
    )
    .map_err(sql("forget a snapshot"))?;
    Ok(())
}

pub(crate) fn doomed(c: &Connection) -> Result<Vec<SnapshotId>> {
    let act = "list the doomed snapshots";
    let mut statement = c
        .prepare_cached("SELECT id FROM snapshots WHERE state = 'doomed'")
        .map_err(sql(act))?;
    let rows = statement
        .query_map([], |row| row.get::<_, String>(0))
        .map_err(sql(act))?;
    rows.map(|row| id(&row.map_err(sql(act))?)).collect()
}

/// Every snapshot that has a row.
pub(crate) fn all_ids(c: &Connection) -> Result<std::collections::HashSet<String>> {
    let act = "list the snapshots";
    let mut statement = c.prepare_cached("SELECT id FROM snapshots").map_err(sql(act))?;
    let rows = statement.query_map([], |row| row.get(0)).map_err(sql(act))?;
    rows.collect::<rusqlite::Result<_>>().map_err(sql(act))
}

/// Active snapshots that have a key, oldest first.
pub(crate) fn actives(c: &Connection) -> Result<Vec<ActiveInfo>> {
    let act = "list the active snapshots";
    let mut statement = c
        .prepare_cached(
            "SELECT key, id, coalesce(lease, ''), since FROM snapshots
             WHERE state = 'active' AND key IS NOT NULL ORDER BY since, key",
        )
        .map_err(sql(act))?;
    let rows = statement
        .query_map([], |row| {
            Ok((
                row.get::<_, String>(0)?,
                row.get::<_, String>(1)?,
                row.get::<_, String>(2)?,
                row.get::<_, i64>(3)?,
            ))
        })
        .map_err(sql(act))?;
    rows.map(|row| {
        let (key, snapshot, lease, since) = row.map_err(sql(act))?;
        Ok(ActiveInfo {
            key,
            snapshot: id(&snapshot)?,
            lease,
            created_at: time(since),
        })
    })
    .collect()
}

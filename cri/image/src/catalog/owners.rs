//! Who has the store open, and what each would leave outside it.

use super::{now, typed};
use crate::error::{Result, StoreError, sql};
use crate::store::OwnerKind;
use rusqlite::{Connection, OptionalExtension};

pub(crate) struct OwnerRow {
    pub(crate) kind: OwnerKind,
    pub(crate) estate: Option<String>,
}

pub(crate) fn add(c: &Connection, id: &str, kind: OwnerKind, pid: u32, boot: &str) -> Result<()> {
    c.execute(
        "INSERT INTO owners (id, kind, pid, boot, since) VALUES (?1, ?2, ?3, ?4, ?5)",
        (id, kind.as_str(), pid, boot, now()),
    )
    .map_err(sql("add an owner"))?;
    Ok(())
}

pub(crate) fn get(c: &Connection, id: &str) -> Result<Option<OwnerRow>> {
    let row: Option<(String, Option<String>)> = c
        .query_row("SELECT kind, estate FROM owners WHERE id = ?1", [id], |row| {
            Ok((row.get(0)?, row.get(1)?))
        })
        .optional()
        .map_err(sql("read an owner"))?;
    row.map(|(kind, estate)| {
        Ok(OwnerRow {
            kind: typed("kind of owner", &kind)?,
            estate,
        })
    })
    .transpose()
}

pub(crate) fn ids(c: &Connection) -> Result<Vec<String>> {
    let mut statement = c
        .prepare_cached("SELECT id FROM owners")
        .map_err(sql("list the owners"))?;
    let rows = statement
        .query_map([], |row| row.get(0))
        .map_err(sql("list the owners"))?;
    rows.collect::<rusqlite::Result<_>>()
        .map_err(sql("list the owners"))
}

pub(crate) fn set_estate(c: &Connection, id: &str, estate: Option<&str>) -> Result<()> {
    let changed = c
        .execute("UPDATE owners SET estate = ?2 WHERE id = ?1", (id, estate))
        .map_err(sql("write an owner's estate"))?;
    if changed == 0 {
        return Err(StoreError::OwnerGone { owner: id.to_owned() });
    }
    Ok(())
}

/// Removes an owner with its leases; the active snapshots they held are doomed.
pub(crate) fn bury(c: &Connection, id: &str) -> Result<()> {
    c.execute(
        "UPDATE snapshots SET state = 'doomed', key = NULL
         WHERE state = 'active' AND lease IN (SELECT name FROM leases WHERE owner = ?1)",
        [id],
    )
    .map_err(sql("doom a dead owner's snapshots"))?;
    c.execute("DELETE FROM leases WHERE owner = ?1", [id])
        .map_err(sql("remove a dead owner's leases"))?;
    c.execute("DELETE FROM owners WHERE id = ?1", [id])
        .map_err(sql("remove a dead owner"))?;
    Ok(())
}

//! Leases and what they hold.

use super::now;
use crate::error::{Result, StoreError, sql};
use rusqlite::{Connection, OptionalExtension};
use std::fmt::Display;

/// What a lease can hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Item {
    Blob,
    Layer,
    Image,
}

impl Item {
    fn as_str(self) -> &'static str {
        match self {
            Item::Blob => "blob",
            Item::Layer => "layer",
            Item::Image => "image",
        }
    }
}

/// Adds a lease; an owner of `None` makes it persistent. One that is there is left as it is.
pub(crate) fn add(c: &Connection, name: &str, owner: Option<&str>, what: &str) -> Result<()> {
    c.execute(
        "INSERT INTO leases (name, owner, what, since) VALUES (?1, ?2, ?3, ?4) ON CONFLICT (name) DO NOTHING",
        (name, owner, what, now()),
    )
    .map_err(sql("add a lease"))?;
    Ok(())
}

/// Whether a lease exists, and is persistent.
pub(crate) fn persistent(c: &Connection, name: &str) -> Result<Option<bool>> {
    c.query_row(
        "SELECT owner IS NULL FROM leases WHERE name = ?1",
        [name],
        |row| row.get(0),
    )
    .optional()
    .map_err(sql("look a lease up"))
}

/// Fails when the lease is gone: nothing may be used through it any more.
pub(crate) fn check(c: &Connection, name: &str) -> Result<()> {
    match persistent(c, name)? {
        Some(_) => Ok(()),
        None => Err(StoreError::LeaseGone {
            lease: name.to_owned(),
        }),
    }
}

/// Lets a lease hold something.
pub(crate) fn hold(c: &Connection, name: &str, kind: Item, item: &dyn Display) -> Result<()> {
    check(c, name)?;
    let mut statement = c
        .prepare_cached(
            "INSERT INTO lease_items (lease, kind, item) VALUES (?1, ?2, ?3) ON CONFLICT DO NOTHING",
        )
        .map_err(sql("hold something by a lease"))?;
    statement
        .execute((name, kind.as_str(), item.to_string()))
        .map_err(sql("hold something by a lease"))?;
    Ok(())
}

/// Removes a lease; the active snapshots it held are doomed. Their ids.
pub(crate) fn release(c: &Connection, name: &str) -> Result<Vec<String>> {
    let act = "release a lease";
    let mut statement = c
        .prepare_cached(
            "UPDATE snapshots SET state = 'doomed', key = NULL WHERE state = 'active' AND lease = ?1 RETURNING id",
        )
        .map_err(sql(act))?;
    let ids = statement.query_map([name], |row| row.get(0)).map_err(sql(act))?;
    let ids = ids.collect::<rusqlite::Result<Vec<String>>>().map_err(sql(act))?;
    c.execute("DELETE FROM leases WHERE name = ?1", [name])
        .map_err(sql(act))?;
    Ok(ids)
}

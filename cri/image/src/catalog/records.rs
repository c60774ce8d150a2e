//! Runtime records: kind, id, a name unique within the kind, and JSON that means nothing here.

use super::now;
use crate::error::{Result, StoreError, sql};
use crate::store::Record;
use rusqlite::{Connection, OptionalExtension, Row};

fn record(row: &Row<'_>) -> rusqlite::Result<Record> {
    Ok(Record {
        id: row.get(0)?,
        name: row.get(1)?,
        json: row.get(2)?,
    })
}

pub(crate) fn put(c: &Connection, kind: &str, id: &str, name: Option<&str>, json: &str) -> Result<()> {
    if let Some(name) = name
        && let Some(other) = by_name(c, kind, name)?
        && other.id != id
    {
        return Err(StoreError::NameTaken {
            kind: kind.to_owned(),
            name: name.to_owned(),
            by: other.id,
        });
    }
    let mut statement = c
        .prepare_cached(
            "INSERT INTO records (kind, id, name, json, since) VALUES (?1, ?2, ?3, ?4, ?5)
             ON CONFLICT (kind, id) DO UPDATE SET name = excluded.name, json = excluded.json",
        )
        .map_err(sql("write a record"))?;
    statement
        .execute((kind, id, name, json, now()))
        .map_err(sql("write a record"))?;
    Ok(())
}

pub(crate) fn get(c: &Connection, kind: &str, id: &str) -> Result<Option<Record>> {
    let mut statement = c
        .prepare_cached("SELECT id, name, json FROM records WHERE kind = ?1 AND id = ?2")
        .map_err(sql("read a record"))?;
    statement
        .query_row((kind, id), record)
        .optional()
        .map_err(sql("read a record"))
}

pub(crate) fn by_name(c: &Connection, kind: &str, name: &str) -> Result<Option<Record>> {
    let mut statement = c
        .prepare_cached("SELECT id, name, json FROM records WHERE kind = ?1 AND name = ?2")
        .map_err(sql("read a record"))?;
    statement
        .query_row((kind, name), record)
        .optional()
        .map_err(sql("read a record"))
}

pub(crate) fn list(c: &Connection, kind: &str) -> Result<Vec<Record>> {
    let mut statement = c
        .prepare_cached("SELECT id, name, json FROM records WHERE kind = ?1 ORDER BY since, id")
        .map_err(sql("list records"))?;
    let rows = statement.query_map([kind], record).map_err(sql("list records"))?;
    rows.collect::<rusqlite::Result<_>>().map_err(sql("list records"))
}

pub(crate) fn delete(c: &Connection, kind: &str, id: &str) -> Result<()> {
    c.execute("DELETE FROM records WHERE kind = ?1 AND id = ?2", (kind, id))
        .map_err(sql("delete a record"))?;
    Ok(())
}

//! Layers by chain: which snapshot holds each, and how it was made.

use super::{int, now, snapshots, typed, uint};
use crate::digest::ChainId;
use crate::error::{Result, StoreError, sql};
use crate::store::{Layer, LayerOptions};
use rusqlite::{Connection, OptionalExtension, Row};
use slipway_snapshot::Usage;

const COLUMNS: &str = "chain, diff_id, parent, snapshot, bytes, inodes, tar_bytes";

type Raw = (String, String, Option<String>, String, i64, i64, i64);

fn raw(row: &Row<'_>) -> rusqlite::Result<Raw> {
    Ok((
        row.get(0)?,
        row.get(1)?,
        row.get(2)?,
        row.get(3)?,
        row.get(4)?,
        row.get(5)?,
        row.get(6)?,
    ))
}

fn parse((chain, diff_id, parent, snapshot, bytes, inodes, tar_bytes): Raw) -> Result<Layer> {
    Ok(Layer {
        chain: typed("chain", &chain)?,
        diff_id: typed("diff id", &diff_id)?,
        parent: parent.map(|parent| typed("chain", &parent)).transpose()?,
        snapshot: snapshots::id(&snapshot)?,
        usage: Usage {
            bytes: uint(bytes),
            inodes: uint(inodes),
        },
        tar_bytes: uint(tar_bytes),
    })
}

/// A layer that is not doomed; its files are the caller's to check.
pub(crate) fn get(c: &Connection, chain: &ChainId) -> Result<Option<Layer>> {
    let mut statement = c
        .prepare_cached(&format!(
            "SELECT {COLUMNS} FROM layers WHERE chain = ?1 AND doomed = 0"
        ))
        .map_err(sql("look a layer up"))?;
    let row = statement
        .query_row([chain.to_string()], raw)
        .optional()
        .map_err(sql("look a layer up"))?;
    row.map(parse).transpose()
}

/// A chain's layers, topmost first; `None` when one of them is not here.
pub(crate) fn chain(c: &Connection, chain: &ChainId) -> Result<Option<Vec<Layer>>> {
    let mut found = Vec::new();
    let mut next = Some(*chain);
    while let Some(chain) = next {
        let Some(layer) = get(c, &chain)? else {
            return Ok(None);
        };
        next = layer.parent;
        found.push(layer);
    }
    Ok(Some(found))
}

/// Adds a layer, or puts another snapshot in the place of one that was doomed or torn.
pub(crate) fn put(c: &Connection, layer: &Layer, options: Option<&LayerOptions>) -> Result<()> {
    let options = options.map(|options| serde_json::to_string(options).unwrap_or_default());
    c.execute(
        "INSERT INTO layers (chain, diff_id, parent, snapshot, bytes, inodes, tar_bytes, options, since)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9)
         ON CONFLICT (chain) DO UPDATE SET snapshot = excluded.snapshot, bytes = excluded.bytes,
             inodes = excluded.inodes, tar_bytes = excluded.tar_bytes, options = excluded.options,
             since = excluded.since, doomed = 0",
        (
            layer.chain.to_string(),
            layer.diff_id.to_string(),
            layer.parent.map(|parent| parent.to_string()),
            layer.snapshot.as_str(),
            int(layer.usage.bytes),
            int(layer.usage.inodes),
            int(layer.tar_bytes),
            options,
            now(),
        ),
    )
    .map_err(sql("add a layer"))?;
    Ok(())
}

/// How a built layer's tar was made; `None` for one that was unpacked.
pub(crate) fn options(c: &Connection, chain: &ChainId) -> Result<Option<LayerOptions>> {
    let json: Option<Option<String>> = c
        .query_row(
            "SELECT options FROM layers WHERE chain = ?1",
            [chain.to_string()],
            |row| row.get(0),
        )
        .optional()
        .map_err(sql("read a layer's options"))?;
    let parse = |json: String| {
        serde_json::from_str(&json).map_err(|_| StoreError::BadRow {
            what: "layer's options",
            value: json,
        })
    };
    json.flatten().map(parse).transpose()
}

/// What all layers together take.
pub(crate) fn usage(c: &Connection) -> Result<Usage> {
    c.query_row(
        "SELECT coalesce(sum(bytes), 0), coalesce(sum(inodes), 0) FROM layers",
        [],
        |row| {
            Ok(Usage {
                bytes: uint(row.get(0)?),
                inodes: uint(row.get(1)?),
            })
        },
    )
    .map_err(sql("add the layers up"))
}

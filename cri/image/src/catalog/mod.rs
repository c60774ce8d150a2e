//! The catalog: one SQLite database in WAL mode, shared by several processes.
//!
//! One module a family of tables; each function is one statement or a few that belong to one transaction of the
//! caller's. Owns the schema, the connections and how durable a commit is. Refuses to know files: what a row says
//! about the disk is checked by the store.
//!
//! # Connections
//! Three: writes that must survive a power loss before they are answered (`synchronous` FULL: an image's commit,
//! the marks of garbage collection), writes that must survive only the death of the process (NORMAL: leases,
//! snapshots, runtime records; a later FULL commit makes them durable, too), and reads. Every write transaction is
//! BEGIN IMMEDIATE, so that what it has read is still true when it writes.
//!
//! # Versions
//! `meta` holds the schema and the oldest program that may read and that may write it. A newer program raises the
//! schema, and those two only as far as it must.

pub(crate) mod blobs;
pub(crate) mod cache;
pub(crate) mod images;
pub(crate) mod layers;
pub(crate) mod leases;
pub(crate) mod owners;
pub(crate) mod records;
mod schema;
pub(crate) mod snapshots;
pub(crate) mod sweep;
pub(crate) mod variants;

use crate::digest::Digest;
use crate::error::{Result, StoreError, sql};
use rusqlite::{Connection, OpenFlags, Transaction, TransactionBehavior};
use std::path::Path;
use std::str::FromStr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Other processes hold the write lock for milliseconds; this is for a machine that swaps.
const BUSY: Duration = Duration::from_secs(30);

/// What a commit has survived when it is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Durability {
    /// The loss of power.
    Full,
    /// The death of this process.
    Normal,
}

pub(crate) struct Catalog {
    full: Mutex<Connection>,
    normal: Mutex<Connection>,
    read: Mutex<Connection>,
}

impl Catalog {
    /// Opens the database, making or upgrading it. The caller sees to it that nobody else does so at once.
    pub(crate) fn open(path: &Path) -> Result<Catalog> {
        let full = connect(path)?;
        schema::prepare(&full, path)?;
        set(&full, "synchronous", "FULL")?;
        let normal = connect(path)?;
        set(&normal, "synchronous", "NORMAL")?;
        let read = connect(path)?;
        set(&read, "query_only", "ON")?;
        Ok(Catalog {
            full: Mutex::new(full),
            normal: Mutex::new(normal),
            read: Mutex::new(read),
        })
    }

    /// Runs a query.
    pub(crate) fn read<T>(&self, query: impl FnOnce(&Connection) -> Result<T>) -> Result<T> {
        query(&lock(&self.read))
    }

    /// Runs a transaction; it is rolled back when `work` fails.
    pub(crate) fn write<T>(
        &self,
        durability: Durability,
        work: impl FnOnce(&Transaction<'_>) -> Result<T>,
    ) -> Result<T> {
        let connection = match durability {
            Durability::Full => &self.full,
            Durability::Normal => &self.normal,
        };
        let connection = lock(connection);
        let transaction = Transaction::new_unchecked(&connection, TransactionBehavior::Immediate)
            .map_err(sql("begin a transaction"))?;
        let result = work(&transaction)?;
        transaction.commit().map_err(sql("commit a transaction"))?;
        Ok(result)
    }
}

/// A thread that panicked in a transaction has rolled it back: the connection is as good as before.
fn lock(connection: &Mutex<Connection>) -> MutexGuard<'_, Connection> {
    connection.lock().unwrap_or_else(PoisonError::into_inner)
}

fn connect(path: &Path) -> Result<Connection> {
    let flags =
        OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_CREATE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags).map_err(sql("open the database"))?;
    connection
        .busy_timeout(BUSY)
        .map_err(sql("set the busy timeout"))?;
    set(&connection, "foreign_keys", "ON")?;
    // Kibibytes. The working set is small, and the daemon's memory is counted.
    set(&connection, "cache_size", "-512")?;
    // Bytes of the log that are kept after a checkpoint.
    set(&connection, "journal_size_limit", "4194304")?;
    connection.set_prepared_statement_cache_capacity(32);
    Ok(connection)
}

fn set(connection: &Connection, pragma: &str, value: &str) -> Result<()> {
    connection
        .pragma_update(None, pragma, value)
        .map_err(sql("configure the database"))
}

/// Now, as rows have it: milliseconds since 1970.
pub(crate) fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

/// The time of a row.
pub(crate) fn time(millis: i64) -> SystemTime {
    UNIX_EPOCH + Duration::from_millis(u64::try_from(millis).unwrap_or(0))
}

/// Reads a typed value out of a row's text.
pub(crate) fn typed<T: FromStr>(what: &'static str, text: &str) -> Result<T> {
    text.parse().map_err(|_| StoreError::BadRow {
        what,
        value: text.chars().take(100).collect(),
    })
}

/// A digest of a row.
pub(crate) fn digest(text: &str) -> Result<Digest> {
    typed("digest", text)
}

/// SQLite's integers are signed.
pub(crate) fn int(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

pub(crate) fn uint(value: i64) -> u64 {
    u64::try_from(value).unwrap_or(0)
}

//! What the shim says about itself: lines on stderr, which is a file of bounded size. Knows nothing of containers' logs.
//!
//! `slipwayd` gives a file opened for appending; a line that would take it past [`LIMIT`] empties it first. Under
//! containerd stderr is a fifo that is never waited for: a line that does not fit is not said.

use std::fmt;
use std::io::IsTerminal;
use std::sync::atomic::{AtomicU8, Ordering};

/// How long the file may become.
const LIMIT: u64 = 256 * 1024;

/// How much is said.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Level {
    /// Something failed.
    Error = 0,
    /// Something is odd.
    Warn,
    /// A change of state.
    Info,
    /// Everything.
    Debug,
}

static LEVEL: AtomicU8 = AtomicU8::new(Level::Info as u8);

/// Says no more than this from now on; an unknown name changes nothing.
pub fn set_level(name: &str) {
    let level = match name {
        "error" => Level::Error,
        "warn" => Level::Warn,
        "info" => Level::Info,
        "debug" | "trace" => Level::Debug,
        _ => return,
    };
    LEVEL.store(level as u8, Ordering::Relaxed);
}

/// Says one line.
pub fn say(level: Level, what: fmt::Arguments<'_>) {
    if level as u8 > LEVEL.load(Ordering::Relaxed) {
        return;
    }
    let name = match level {
        Level::Error => "error",
        Level::Warn => "warn",
        Level::Info => "info",
        Level::Debug => "debug",
    };
    let mut line = Vec::with_capacity(128);
    if !std::io::stderr().is_terminal() {
        crate::clock::stamp(crate::clock::now(), &mut line);
        line.push(b' ');
    }
    line.extend_from_slice(format!("{name}: {what}\n").as_bytes());
    let stderr = rustix::stdio::stderr();
    if let Ok(stat) = rustix::fs::fstat(stderr) {
        let regular = rustix::fs::FileType::from_raw_mode(stat.st_mode) == rustix::fs::FileType::RegularFile;
        let size = u64::try_from(stat.st_size).unwrap_or(0);
        if regular && size + line.len() as u64 > LIMIT {
            let _ = rustix::fs::ftruncate(stderr, 0);
        }
    }
    // Nobody to tell when this fails.
    let _ = rustix::io::write(stderr, &line);
}

/// Says that something failed.
macro_rules! error {
    ($($what:tt)*) => { $crate::diag::say($crate::diag::Level::Error, format_args!($($what)*)) };
}
/// Says that something is odd.
macro_rules! warning {
    ($($what:tt)*) => { $crate::diag::say($crate::diag::Level::Warn, format_args!($($what)*)) };
}
/// Says what changed.
macro_rules! info {
    ($($what:tt)*) => { $crate::diag::say($crate::diag::Level::Info, format_args!($($what)*)) };
}
/// Says everything else.
macro_rules! debug {
    ($($what:tt)*) => { $crate::diag::say($crate::diag::Level::Debug, format_args!($($what)*)) };
}
pub(crate) use {debug, error, info, warning};

/// An error with all its causes on one line.
pub struct Chain<'a>(pub &'a (dyn std::error::Error + 'static));

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        let mut next = self.0.source();
        while let Some(cause) = next {
            write!(f, ": {cause}")?;
            next = cause.source();
        }
        Ok(())
    }
}

//! Places at which a test can make the process die, as the loss of power or a kill would. Always compiled; one load
//! of a static when off.
//!
//! `SLIPWAY_STORE_FAILPOINT=<name>` kills the process with SIGKILL at that place; `<name>=stop` stops it there with SIGSTOP,
//! for whoever wants to cut the power with the work half done. The names stand in [`ALL`], which `slipwayd failpoints`
//! prints with `store.` before them.

use std::sync::OnceLock;

/// Every place, in the order in which an image's life passes them.
pub const ALL: &[&str] = &[
    "prepare.after_row",
    "ingest.before_rename",
    "ingest.after_rename",
    "unpack.after_rows",
    "unpack.after_files",
    "commit.before_sync",
    "commit.after_sync",
    "commit_image.before_row",
    "commit_image.after_row",
    "remove_image.after_row",
    "remove.after_directory",
    "gc.after_mark",
    "gc.after_rename",
];

static POINT: OnceLock<Option<String>> = OnceLock::new();

/// Dies here when told to.
pub(crate) fn reach(name: &str) {
    debug_assert!(ALL.contains(&name), "{name} is missing from failpoint::ALL");
    let set = POINT.get_or_init(|| std::env::var("SLIPWAY_STORE_FAILPOINT").ok());
    let signal = match set.as_deref().and_then(|set| set.strip_prefix(name)) {
        // No unwinding, no destructors: what is on disk stays as it is.
        Some("") => rustix::process::Signal::KILL,
        Some("=stop") => rustix::process::Signal::STOP,
        _ => return,
    };
    let _ = rustix::process::kill_process(rustix::process::getpid(), signal);
}

//! Finds the conformance corpora, which live outside the repository.

use std::io::Write as _;
use std::path::PathBuf;

/// The corpora's folder: `$SLIPWAY_CORPORA`, else `../shared/corpora` beside the checkout. None, and a
/// line on stderr that says so, where it is not there.
pub fn folder() -> Option<PathBuf> {
    let beside = concat!(env!("CARGO_MANIFEST_DIR"), "/../../../shared/corpora");
    let folder = std::env::var_os("SLIPWAY_CORPORA").map_or_else(|| beside.into(), PathBuf::from);
    if folder.is_dir() {
        return Some(folder);
    }
    let _ = writeln!(
        std::io::stderr(),
        "SKIPPED: no corpora at {} (set SLIPWAY_CORPORA)",
        folder.display()
    );
    None
}

/// A file of the corpora.
#[allow(dead_code)] // not every test binary reads one
pub fn read(path: &str) -> Option<String> {
    let path = folder()?.join(path);
    Some(std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display())))
}

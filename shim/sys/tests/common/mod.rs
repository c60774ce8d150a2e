//! What the tests that need root share: the loud skip.
#![allow(dead_code)] // each test binary uses a part

use std::io::Write as _;

/// Whether we may do what these tests do; says so loudly when not.
pub fn root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        let _ = writeln!(std::io::stderr(), "\n*** SKIPPED: this test needs root ***\n");
    }
    root
}

/// A name no other test run has.
pub fn unique(what: &str) -> String {
    use std::sync::atomic::{AtomicU32, Ordering};
    static N: AtomicU32 = AtomicU32::new(0);
    format!(
        "slipway-test-{}-{what}-{}",
        std::process::id(),
        N.fetch_add(1, Ordering::Relaxed)
    )
}

//! Places at which a test can make the process die, as the loss of power or a kill would. Always compiled; one load
//! of a static when off.
//!
//! `SLIPWAY_STORE_FAILPOINT=<name>` kills the process with SIGKILL at that place. The names are those in the calls.

use std::sync::OnceLock;

static POINT: OnceLock<Option<String>> = OnceLock::new();

/// Dies here when told to.
pub(crate) fn reach(name: &str) {
    let set = POINT.get_or_init(|| std::env::var("SLIPWAY_STORE_FAILPOINT").ok());
    if set.as_deref() == Some(name) {
        // No unwinding, no destructors: what is on disk stays as it is.
        let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
    }
}

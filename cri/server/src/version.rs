//! Which slipwayd this is: its version, and that of the records it writes. Tests of upgrades let one binary pass for a later
//! one; nobody else has a reason to.

use std::sync::OnceLock;

/// `<version>/<version of records>`, for tests that play an upgrade.
const VARIABLE: &str = "SLIPWAY_AS_VERSION";

/// What the variable says, read once.
fn told() -> Option<&'static (String, u32)> {
    static TOLD: OnceLock<Option<(String, u32)>> = OnceLock::new();
    TOLD.get_or_init(|| {
        let text = std::env::var(VARIABLE).ok()?;
        let (version, records) = text.split_once('/')?;
        Some((version.to_owned(), records.parse().ok()?))
    })
    .as_ref()
}

/// This build's version.
pub fn program() -> &'static str {
    told().map_or(env!("CARGO_PKG_VERSION"), |(version, _)| version)
}

/// The version of records, given the one this build knows.
pub fn records(built: u32) -> u32 {
    told().map_or(built, |(_, records)| *records)
}

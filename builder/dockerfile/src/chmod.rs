//! `--chmod`: octal and symbolic modes. Knows no files.

use serde::Serialize;

/// A mode to give to copied files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Chmod {
    /// Permission bits, setuid, setgid and sticky: at most 0o7777.
    Octal(u32),
    /// `u+rwX,go=r`: [`Chmod::apply`] says what it makes of a mode.
    Symbolic(String),
}

//! References with Docker's defaults. (The least that the store needs; the registry part brings the whole.)

use std::fmt;

/// A normalised image reference.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Reference(String);

/// The text is not a reference.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a reference")]
pub struct ReferenceError;

impl Reference {
    /// Reads a reference.
    ///
    /// # Errors
    /// [`ReferenceError`].
    pub fn parse(text: &str) -> Result<Reference, ReferenceError> {
        if text.is_empty() { Err(ReferenceError) } else { Ok(Reference(text.to_owned())) }
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

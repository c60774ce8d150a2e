//! The name of a snapshot: an opaque directory name, checked once.
//!
//! Refuses to know what the snapshot holds, whose it is and what lies below it: those are rows of the
//! catalog (slipway-image).

use crate::error::SnapshotError;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::io::Read;

/// The opaque name of a snapshot's directory: 1 to 32 characters of `[a-z0-9]`.
///
/// It says nothing about the contents, so that two unpackings of one layer never share a directory by
/// accident and a name is never used twice.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SnapshotId(String);

impl SnapshotId {
    /// Checks a name that came from the catalog or from a directory listing.
    ///
    /// # Errors
    /// [`SnapshotError::BadId`] when it is not 1 to 32 characters of `[a-z0-9]`.
    pub fn new(name: impl Into<String>) -> Result<SnapshotId, SnapshotError> {
        let name = name.into();
        let good = (1..=32).contains(&name.len())
            && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
        if good {
            Ok(SnapshotId(name))
        } else {
            Err(SnapshotError::BadId { name })
        }
    }

    /// A fresh name of 20 random characters (103 bits).
    ///
    /// # Errors
    /// When the kernel's random source cannot be read.
    pub fn new_random() -> Result<SnapshotId, SnapshotError> {
        const LETTERS: &[u8; 36] = b"abcdefghijklmnopqrstuvwxyz0123456789";
        let mut random = [0u8; 20];
        std::fs::File::open("/dev/urandom")
            .and_then(|mut file| file.read_exact(&mut random))
            .map_err(|source| SnapshotError::Random { source })?;
        let name = random
            .iter()
            .map(|b| char::from(LETTERS[usize::from(*b) % LETTERS.len()]))
            .collect();
        Ok(SnapshotId(name))
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for SnapshotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for SnapshotId {
    type Error = SnapshotError;
    fn try_from(name: String) -> Result<SnapshotId, SnapshotError> {
        SnapshotId::new(name)
    }
}

impl From<SnapshotId> for String {
    fn from(id: SnapshotId) -> String {
        id.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_could_leave_the_directory_is_refused() {
        for bad in ["", ".", "..", "a/b", "A", "a-b", &"a".repeat(33)] {
            assert!(SnapshotId::new(bad).is_err(), "{bad:?} was accepted");
        }
    }

    #[test]
    fn random_names_differ_and_pass_their_own_check() {
        let (a, b) = (
            SnapshotId::new_random().unwrap(),
            SnapshotId::new_random().unwrap(),
        );
        assert_ne!(a, b);
        assert_eq!(SnapshotId::new(a.as_str()).unwrap(), a);
    }
}

//! Names of pods and containers: what has been checked once is a type. Also the source of new, random ones.
//!
//! Both are 64 lower-case hex digits: log shippers match container log files by exactly that.

use std::fmt;
use std::io::Read as _;

use serde::{Deserialize, Serialize};

/// Bytes of randomness in an id.
const ID_BYTES: usize = 32;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(String);

        impl $name {
            /// A new one that nothing else has.
            pub fn random() -> std::io::Result<Self> {
                Ok(Self(random_hex()?))
            }

            /// Takes a whole id as it stands on disk; `None` when it is none.
            pub fn parse(text: &str) -> Option<Self> {
                is_id(text).then(|| Self(text.to_owned()))
            }

            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }
    };
}

id!(
    /// A pod sandbox's id.
    PodId
);
id!(
    /// A container's id.
    ContainerId
);

fn is_id(text: &str) -> bool {
    text.len() == ID_BYTES * 2
        && text
            .bytes()
            .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

fn random_hex() -> std::io::Result<String> {
    let mut bytes = [0u8; ID_BYTES];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(hex::encode(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_id_is_one_that_is_accepted_back() {
        let id = ContainerId::random().unwrap();
        assert_eq!(ContainerId::parse(id.as_str()), Some(id.clone()));
        assert_ne!(ContainerId::random().unwrap(), id);
    }

    #[test]
    fn what_could_be_a_path_is_no_id() {
        for text in ["", "..", "a/b", &"A".repeat(64), &"a".repeat(63), &"g".repeat(64)] {
            assert_eq!(PodId::parse(text), None, "{text}");
        }
    }
}

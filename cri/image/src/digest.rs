//! SHA-256 digests and the identities made of them: DiffID, ChainID, ImageID.
//!
//! What has been checked once is a type: a [`Digest`] can be used as a file name. Refuses to know other
//! algorithms: registered ones exist (sha512), nobody serves them.

use serde::{Deserialize, Serialize};
use sha2::Digest as _;
use std::fmt;
use std::str::FromStr;

/// A SHA-256 digest; as text `sha256:` and 64 lower-case hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest([u8; 32]);

/// The text is not a digest that we can check contents against.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DigestError {
    /// Some other algorithm.
    #[error("digest {given:?} uses an algorithm other than sha256")]
    Algorithm {
        /// What was given, shortened.
        given: String,
    },
    /// Not 64 lower-case hexadecimal digits.
    #[error("digest {given:?} is not sha256: and 64 lower-case hexadecimal digits")]
    Form {
        /// What was given, shortened.
        given: String,
    },
}

impl Digest {
    /// The digest of bytes in memory.
    pub fn of(bytes: &[u8]) -> Digest {
        Digest(sha2::Sha256::digest(bytes).into())
    }

    /// The digest that a finished hash holds.
    pub fn from_hash(hash: sha2::Sha256) -> Digest {
        Digest(hash.finalize().into())
    }

    /// The digest whose 32 bytes these are.
    pub const fn from_bytes(bytes: [u8; 32]) -> Digest {
        Digest(bytes)
    }

    /// The 32 bytes.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The 64 hexadecimal digits, without the algorithm.
    pub fn hex(&self) -> String {
        hex::encode(self.0)
    }

    /// Reads 64 lower-case hexadecimal digits.
    ///
    /// # Errors
    /// [`DigestError::Form`].
    pub fn from_hex(digits: &str) -> Result<Digest, DigestError> {
        let form = || DigestError::Form {
            given: shorten(digits),
        };
        if digits.len() != 64 || digits.bytes().any(|b| b.is_ascii_uppercase()) {
            return Err(form());
        }
        let mut bytes = [0u8; 32];
        hex::decode_to_slice(digits, &mut bytes).map_err(|_| form())?;
        Ok(Digest(bytes))
    }
}

fn shorten(text: &str) -> String {
    text.chars().take(80).collect()
}

impl FromStr for Digest {
    type Err = DigestError;
    fn from_str(text: &str) -> Result<Digest, DigestError> {
        match text.split_once(':') {
            Some(("sha256", digits)) => Digest::from_hex(digits),
            Some((algorithm, _)) if !algorithm.is_empty() => {
                Err(DigestError::Algorithm { given: shorten(text) })
            }
            _ => Err(DigestError::Form { given: shorten(text) }),
        }
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl TryFrom<String> for Digest {
    type Error = DigestError;
    fn try_from(text: String) -> Result<Digest, DigestError> {
        text.parse()
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> String {
        digest.to_string()
    }
}

impl TryFrom<&oci_spec::image::Digest> for Digest {
    type Error = DigestError;
    fn try_from(digest: &oci_spec::image::Digest) -> Result<Digest, DigestError> {
        digest.to_string().parse()
    }
}

impl From<Digest> for oci_spec::image::Digest {
    fn from(digest: Digest) -> oci_spec::image::Digest {
        digest
            .to_string()
            .parse()
            .expect("our text form is a valid OCI digest")
    }
}

macro_rules! identity {
    ($(#[$meta:meta])* $name:ident) => {
        $(#[$meta])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(Digest);

        impl $name {
            /// The digest that is this identity.
            pub const fn digest(&self) -> &Digest {
                &self.0
            }
        }

        impl From<Digest> for $name {
            fn from(digest: Digest) -> $name {
                $name(digest)
            }
        }

        impl FromStr for $name {
            type Err = DigestError;
            fn from_str(text: &str) -> Result<$name, DigestError> {
                text.parse().map($name)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }
    };
}

identity! {
    /// The digest of one layer's uncompressed tar.
    DiffId
}
identity! {
    /// A layer together with everything below it (OCI image spec, "Layer ChainID").
    ChainId
}
identity! {
    /// An image: the digest of its configuration.
    ImageId
}

impl ChainId {
    /// The chain of one more layer on top of `parent`.
    pub fn child(parent: Option<&ChainId>, diff: &DiffId) -> ChainId {
        match parent {
            None => ChainId(diff.0),
            Some(parent) => ChainId(Digest::of(format!("{parent} {diff}").as_bytes())),
        }
    }

    /// The chains of all layers, bottom first.
    pub fn all(diffs: &[DiffId]) -> Vec<ChainId> {
        let mut chains: Vec<ChainId> = Vec::with_capacity(diffs.len());
        for diff in diffs {
            chains.push(ChainId::child(chains.last(), diff));
        }
        chains
    }

    /// The chain of an image's layers, bottom first; `None` for an image without layers.
    pub fn of(diffs: &[DiffId]) -> Option<ChainId> {
        ChainId::all(diffs).pop()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_sha256_with_64_lower_case_digits_is_a_digest() {
        let good = format!("sha256:{}", "0a".repeat(32));
        assert_eq!(good.parse::<Digest>().unwrap().to_string(), good);
        let upper = format!("sha256:{}", "0A".repeat(32));
        for bad in [
            "",
            "sha256:",
            "sha256:00",
            ":00",
            "../../etc",
            upper.as_str(),
            &format!("{good}0"),
        ] {
            assert!(
                matches!(bad.parse::<Digest>(), Err(DigestError::Form { .. })),
                "{bad}"
            );
        }
        let other = format!("sha512:{}", "0a".repeat(64));
        assert!(matches!(
            other.parse::<Digest>(),
            Err(DigestError::Algorithm { .. })
        ));
    }

    #[test]
    fn the_chain_of_one_layer_is_its_diff_id_and_of_two_the_digest_of_both() {
        let a = DiffId::from(Digest::of(b"a"));
        let b = DiffId::from(Digest::of(b"b"));
        assert_eq!(ChainId::of(&[]), None);
        assert_eq!(ChainId::of(&[a]).unwrap().digest(), a.digest());
        let two = Digest::of(format!("{a} {b}").as_bytes());
        assert_eq!(ChainId::of(&[a, b]).unwrap().digest(), &two);
    }

    #[test]
    fn a_digest_survives_json_and_a_bad_one_in_json_is_refused() {
        let digest = Digest::of(b"x");
        let text = serde_json::to_string(&digest).unwrap();
        assert_eq!(serde_json::from_str::<Digest>(&text).unwrap(), digest);
        assert!(serde_json::from_str::<ChainId>("\"sha256:zz\"").is_err());
    }
}

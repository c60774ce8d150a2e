//! Image references with Docker's defaults: `python:3.12-slim` is `docker.io/library/python:3.12-slim`.
//!
//! Pure. The grammar is that of the distribution project's `reference` package; what was parsed once is safe to put
//! into a URL path. Refuses to know registries: that docker.io is served by another host is the client's business.

use crate::digest::{Digest, DigestError};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// The registry of references that name none.
pub const DEFAULT_REGISTRY: &str = "docker.io";
const LEGACY_REGISTRY: &str = "index.docker.io";
const OFFICIAL: &str = "library";
const DEFAULT_TAG: &str = "latest";
const LONGEST_REPOSITORY: usize = 255;
const LONGEST_HOST: usize = 253 + 6;
const LONGEST_TAG: usize = 128;

/// A normalised image reference: registry, repository, and a tag or a digest or both.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Reference {
    registry: String,
    repository: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

/// The text is not a reference.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReferenceError {
    /// Nothing was given.
    #[error("an image reference must not be empty")]
    Empty,
    /// The repository has upper-case letters.
    #[error("repository {repository:?} must be lower case")]
    UpperCase {
        /// The repository.
        repository: String,
    },
    /// The registry is not a host name or address with an optional port.
    #[error("{host:?} is not a registry host")]
    Host {
        /// The part in question, shortened.
        host: String,
    },
    /// The repository does not fit the grammar.
    #[error(
        "{repository:?} is not a repository name: components of a-z and 0-9, joined by '.', '_', '__' or '-', with '/' between them"
    )]
    Repository {
        /// The part in question, shortened.
        repository: String,
    },
    /// The repository is too long.
    #[error("the repository name has {length} characters, {LONGEST_REPOSITORY} are allowed")]
    TooLong {
        /// Its length.
        length: usize,
    },
    /// The tag does not fit the grammar.
    #[error(
        "{tag:?} is not a tag: at most {LONGEST_TAG} letters, digits, '_', '.' and '-', the first no '.' or '-'"
    )]
    Tag {
        /// The tag, shortened.
        tag: String,
    },
    /// The digest does not fit the grammar or is of another algorithm.
    #[error("read the digest of an image reference")]
    Digest(#[from] DigestError),
    /// 64 hexadecimal digits are an image id, not a name.
    #[error("{id} is an image id, not a name")]
    ImageId {
        /// The digits.
        id: String,
    },
}

impl Reference {
    /// Reads a reference and fills in Docker's defaults: docker.io, `library/`, `latest`.
    ///
    /// # Errors
    /// [`ReferenceError`], which says what is wrong with which part.
    pub fn parse(text: &str) -> Result<Reference, ReferenceError> {
        if text.is_empty() {
            return Err(ReferenceError::Empty);
        }
        if text.len() == 64 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
            return Err(ReferenceError::ImageId { id: text.to_owned() });
        }
        let (rest, digest) = match text.split_once('@') {
            None => (text, None),
            Some((rest, digest)) => (rest, Some(digest.parse::<Digest>()?)),
        };
        let (host, rest) = split_host(rest);
        let (repository, tag) = match rest.split_once(':') {
            None => (rest, None),
            Some((repository, tag)) => (repository, Some(tag)),
        };
        check_host(host)?;
        let registry = if host == LEGACY_REGISTRY {
            DEFAULT_REGISTRY
        } else {
            host
        };
        let repository = match registry == DEFAULT_REGISTRY && !repository.contains('/') {
            true if !repository.is_empty() => format!("{OFFICIAL}/{repository}"),
            _ => repository.to_owned(),
        };
        check_repository(&repository)?;
        let tag = match (tag, &digest) {
            (Some(tag), _) => Some(check_tag(tag)?.to_owned()),
            (None, None) => Some(DEFAULT_TAG.to_owned()),
            (None, Some(_)) => None,
        };
        Ok(Reference {
            registry: registry.to_owned(),
            repository,
            tag,
            digest,
        })
    }

    /// The registry: a host with an optional port.
    pub fn registry(&self) -> &str {
        &self.registry
    }

    /// The repository inside the registry, `library/python`.
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// Registry and repository, `docker.io/library/python`.
    pub fn name(&self) -> String {
        format!("{}/{}", self.registry, self.repository)
    }

    /// The tag; there is one unless the reference has only a digest.
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// The digest of the manifest or index.
    pub fn digest(&self) -> Option<&Digest> {
        self.digest.as_ref()
    }

    /// The same repository with this tag and no digest.
    ///
    /// # Errors
    /// [`ReferenceError::Tag`].
    pub fn with_tag(&self, tag: &str) -> Result<Reference, ReferenceError> {
        let tag = Some(check_tag(tag)?.to_owned());
        Ok(Reference {
            tag,
            digest: None,
            ..self.clone()
        })
    }

    /// The same repository with this digest and no tag: the form of repository digests.
    pub fn with_digest(&self, digest: Digest) -> Reference {
        Reference {
            tag: None,
            digest: Some(digest),
            ..self.clone()
        }
    }

    /// The reference as an image gets it for its name: a digest says all there is to say, so it has no tag then
    /// (as Docker and containerd do).
    pub fn canonical(&self) -> Reference {
        match &self.digest {
            Some(digest) => self.with_digest(*digest),
            None => self.clone(),
        }
    }

    /// As people write it: without `docker.io/` and `library/`.
    pub fn familiar(&self) -> String {
        let mut text = self.to_string();
        if self.registry == DEFAULT_REGISTRY {
            let own = self
                .repository
                .strip_prefix("library/")
                .filter(|r| !r.contains('/'));
            let skip = self.registry.len() + 1 + own.map_or(0, |_| OFFICIAL.len() + 1);
            text.drain(..skip);
        }
        text
    }
}

/// Docker's rule: what comes before the first slash is a host when it has a dot, a colon or upper case, or is
/// `localhost`.
fn split_host(text: &str) -> (&str, &str) {
    match text.split_once('/') {
        Some((host, rest))
            if host.contains(['.', ':'])
                || host == "localhost"
                || host.bytes().any(|b| b.is_ascii_uppercase()) =>
        {
            (host, rest)
        }
        _ => (DEFAULT_REGISTRY, text),
    }
}

fn shorten(text: &str) -> String {
    text.chars().take(80).collect()
}

fn check_host(host: &str) -> Result<(), ReferenceError> {
    let bad = || ReferenceError::Host { host: shorten(host) };
    if host.len() > LONGEST_HOST {
        return Err(bad());
    }
    let (name, port) = match host.strip_prefix('[') {
        Some(rest) => {
            let (address, rest) = rest.split_once(']').ok_or_else(bad)?;
            address.parse::<std::net::Ipv6Addr>().map_err(|_| bad())?;
            match rest {
                "" => ("", None),
                rest => ("", Some(rest.strip_prefix(':').ok_or_else(bad)?)),
            }
        }
        None => match host.split_once(':') {
            None => (host, None),
            Some((name, port)) => (name, Some(port)),
        },
    };
    if let Some(port) = port
        && (!port.bytes().all(|b| b.is_ascii_digit()) || port.parse::<u16>().is_err())
    {
        return Err(bad());
    }
    let component = |part: &str| {
        !part.is_empty()
            && part.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
            && !part.starts_with('-')
            && !part.ends_with('-')
    };
    if !host.starts_with('[') && !name.split('.').all(component) {
        return Err(bad());
    }
    Ok(())
}

fn check_repository(repository: &str) -> Result<(), ReferenceError> {
    if repository.len() > LONGEST_REPOSITORY {
        return Err(ReferenceError::TooLong {
            length: repository.len(),
        });
    }
    if repository.bytes().any(|b| b.is_ascii_uppercase()) {
        return Err(ReferenceError::UpperCase {
            repository: shorten(repository),
        });
    }
    match repository.split('/').all(is_component) {
        true => Ok(()),
        false => Err(ReferenceError::Repository {
            repository: shorten(repository),
        }),
    }
}

/// Letters and digits, joined by one `.` or `_`, by `__`, or by any number of `-`.
fn is_component(text: &str) -> bool {
    let alphanumeric = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = text.as_bytes();
    let ends = [bytes.first(), bytes.last()];
    if !ends.iter().all(|b| b.is_some_and(alphanumeric)) {
        return false;
    }
    let joints = bytes.split(alphanumeric).filter(|joint| !joint.is_empty());
    joints
        .into_iter()
        .all(|joint| matches!(joint, b"." | b"_" | b"__") || joint.iter().all(|b| *b == b'-'))
}

fn check_tag(tag: &str) -> Result<&str, ReferenceError> {
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    let bytes = tag.as_bytes();
    let good = bytes.first().is_some_and(|b| word(*b))
        && bytes.len() <= LONGEST_TAG
        && bytes.iter().all(|b| word(*b) || matches!(b, b'.' | b'-'));
    if good {
        Ok(tag)
    } else {
        Err(ReferenceError::Tag { tag: shorten(tag) })
    }
}

impl FromStr for Reference {
    type Err = ReferenceError;
    fn from_str(text: &str) -> Result<Reference, ReferenceError> {
        Reference::parse(text)
    }
}

impl TryFrom<String> for Reference {
    type Error = ReferenceError;
    fn try_from(text: String) -> Result<Reference, ReferenceError> {
        Reference::parse(&text)
    }
}

impl From<Reference> for String {
    fn from(reference: Reference) -> String {
        reference.to_string()
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.registry, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEX: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    fn full(text: &str) -> String {
        Reference::parse(text)
            .unwrap_or_else(|e| panic!("{text}: {e}"))
            .to_string()
    }

    #[test]
    fn dockers_defaults_are_filled_in() {
        for (given, meant) in [
            ("python", "docker.io/library/python:latest"),
            ("python:3.12-slim", "docker.io/library/python:3.12-slim"),
            ("bitnami/redis", "docker.io/bitnami/redis:latest"),
            ("a/b/c", "docker.io/a/b/c:latest"),
            ("docker.io/python", "docker.io/library/python:latest"),
            ("index.docker.io/python", "docker.io/library/python:latest"),
            (
                "index.docker.io/library/python",
                "docker.io/library/python:latest",
            ),
            ("localhost/x", "localhost/x:latest"),
            ("localhost:5000/x:y", "localhost:5000/x:y"),
            ("ghcr.io/a/b", "ghcr.io/a/b:latest"),
            ("ghcr.io/a", "ghcr.io/a:latest"),
            ("127.0.0.1:5000/x", "127.0.0.1:5000/x:latest"),
            ("[::1]:5000/x", "[::1]:5000/x:latest"),
            ("Host/x", "Host/x:latest"),
            ("host-without-dot/x", "docker.io/host-without-dot/x:latest"),
            ("a__b/c---d.e_f", "docker.io/a__b/c---d.e_f:latest"),
        ] {
            assert_eq!(full(given), meant, "{given}");
            assert_eq!(full(meant), meant, "parsing again changes nothing");
        }
    }

    #[test]
    fn a_digest_replaces_the_default_tag_and_stands_beside_a_given_one() {
        let only = Reference::parse(&format!("python@sha256:{HEX}")).unwrap();
        assert_eq!(only.tag(), None);
        assert_eq!(only.digest().unwrap().hex(), HEX);
        let both = Reference::parse(&format!("python:3@sha256:{HEX}")).unwrap();
        assert_eq!(both.tag(), Some("3"));
        assert_eq!(
            both.to_string(),
            format!("docker.io/library/python:3@sha256:{HEX}")
        );
        assert_eq!(both.canonical(), only);
    }

    #[test]
    fn the_parts_can_be_asked_for() {
        let reference = Reference::parse("quay.io:443/team/app:v1").unwrap();
        assert_eq!(reference.registry(), "quay.io:443");
        assert_eq!(reference.repository(), "team/app");
        assert_eq!(reference.tag(), Some("v1"));
        assert_eq!(reference.name(), "quay.io:443/team/app");
        assert_eq!(
            reference.with_tag("v2").unwrap().to_string(),
            "quay.io:443/team/app:v2"
        );
        assert!(reference.with_tag("-").is_err());
    }

    #[test]
    fn the_familiar_form_parses_to_the_same_reference() {
        for (text, familiar) in [
            ("python", "python:latest"),
            ("docker.io/library/python:3", "python:3"),
            ("bitnami/redis:7", "bitnami/redis:7"),
            ("docker.io/library/a/b", "library/a/b:latest"),
            ("ghcr.io/library/x", "ghcr.io/library/x:latest"),
            ("localhost:5000/x", "localhost:5000/x:latest"),
        ] {
            let reference = Reference::parse(text).unwrap();
            assert_eq!(reference.familiar(), familiar);
            assert_eq!(Reference::parse(&reference.familiar()).unwrap(), reference);
        }
    }

    #[test]
    fn what_is_wrong_is_said_of_the_part_that_is_wrong() {
        use ReferenceError as E;
        type Is = fn(&E) -> bool;
        let cases: &[(&str, Is)] = &[
            ("", |e| matches!(e, E::Empty)),
            (HEX, |e| matches!(e, E::ImageId { .. })),
            ("Python", |e| matches!(e, E::UpperCase { .. })),
            ("ghcr.io/A/b", |e| matches!(e, E::UpperCase { .. })),
            ("a//b", |e| matches!(e, E::Repository { .. })),
            ("/a", |e| matches!(e, E::Repository { .. })),
            ("ghcr.io/", |e| matches!(e, E::Repository { .. })),
            (":tag", |e| matches!(e, E::Repository { .. })),
            ("a..b", |e| matches!(e, E::Repository { .. })),
            ("a___b", |e| matches!(e, E::Repository { .. })),
            ("-a", |e| matches!(e, E::Repository { .. })),
            ("a b", |e| matches!(e, E::Repository { .. })),
            ("../../etc/passwd", |e| matches!(e, E::Host { .. })),
            ("a/../b", |e| matches!(e, E::Repository { .. })),
            ("ä", |e| matches!(e, E::Repository { .. })),
            ("host.:x/a", |e| matches!(e, E::Host { .. })),
            ("h.x:99999/a", |e| matches!(e, E::Host { .. })),
            ("h.x:+1/a", |e| matches!(e, E::Host { .. })),
            ("user:pw@h.x/a", |e| matches!(e, E::Digest(_))),
            ("[z:z]/a", |e| matches!(e, E::Host { .. })),
            ("a:", |e| matches!(e, E::Tag { .. })),
            ("a:.x", |e| matches!(e, E::Tag { .. })),
            ("a:x/y", |e| matches!(e, E::Host { .. })),
            ("a@sha256:12", |e| matches!(e, E::Digest(_))),
            ("a@", |e| matches!(e, E::Digest(_))),
        ];
        for (text, is) in cases {
            let error = Reference::parse(text).expect_err(text);
            assert!(is(&error), "{text:?}: {error}");
        }
    }

    #[test]
    fn lengths_are_limited() {
        assert!(Reference::parse(&format!("a:{}", "t".repeat(128))).is_ok());
        assert!(matches!(
            Reference::parse(&format!("a:{}", "t".repeat(129))),
            Err(ReferenceError::Tag { .. })
        ));
        assert!(Reference::parse(&format!("x.y/{}", "a".repeat(255))).is_ok());
        let long = format!("x.y/{}", "a".repeat(256));
        assert!(matches!(
            Reference::parse(&long),
            Err(ReferenceError::TooLong { length: 256 })
        ));
        assert!(Reference::parse(&format!("{}.x/a", "h".repeat(300))).is_err());
    }
}

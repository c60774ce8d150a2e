//! Names of devices: `vendor/class=device`, and which characters each part may have.

use std::fmt;
use std::str::FromStr;

/// A device's full name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct QualifiedName {
    /// `vendor/class`.
    pub kind: String,
    /// The device within the kind.
    pub device: String,
}

/// Why a name is not one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NameError {
    /// Not of the form.
    #[error("{0:?} is not of the form vendor/class=device")]
    Unqualified(String),
    /// A part with characters it may not have.
    #[error("{part} {value:?} {reason}")]
    Part {
        /// vendor, class or device.
        part: &'static str,
        /// The part.
        value: String,
        /// What is wrong.
        reason: &'static str,
    },
}

impl fmt::Display for QualifiedName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}", self.kind, self.device)
    }
}

impl FromStr for QualifiedName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let unqualified = || NameError::Unqualified(text.to_owned());
        let (kind, device) = text.split_once('=').ok_or_else(unqualified)?;
        if !kind.contains('/') || device.is_empty() {
            return Err(unqualified());
        }
        check_kind(kind)?;
        check_device(device)?;
        Ok(QualifiedName {
            kind: kind.to_owned(),
            device: device.to_owned(),
        })
    }
}

/// Checks `vendor/class`.
pub(crate) fn check_kind(kind: &str) -> Result<(), NameError> {
    let (vendor, class) = kind.split_once('/').ok_or_else(|| NameError::Part {
        part: "kind",
        value: kind.to_owned(),
        reason: "is not of the form vendor/class",
    })?;
    for (part, value) in [("vendor", vendor), ("class", class)] {
        check(part, value, |c| c.is_ascii_alphabetic(), "_-.")?;
    }
    Ok(())
}

/// Checks a device's name within its kind.
pub(crate) fn check_device(name: &str) -> Result<(), NameError> {
    check("device", name, |c| c.is_ascii_alphanumeric(), "_-.:")
}

fn check(part: &'static str, value: &str, first: fn(char) -> bool, inner: &str) -> Result<(), NameError> {
    let bad = |reason| {
        Err(NameError::Part {
            part,
            value: value.to_owned(),
            reason,
        })
    };
    if value.len() > 253 {
        return bad("is longer than 253 characters");
    }
    match (value.chars().next(), value.chars().last()) {
        (Some(a), _) if !first(a) => bad("begins with a character it may not begin with"),
        (_, Some(z)) if !z.is_ascii_alphanumeric() => bad("does not end in a letter or digit"),
        (None, _) => bad("is empty"),
        _ if value
            .chars()
            .any(|c| !c.is_ascii_alphanumeric() && !inner.contains(c)) =>
        {
            bad("has a character it may not have")
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_qualified_name_is_split_into_kind_and_device() {
        let name: QualifiedName = "nvidia.com/gpu=0:1".parse().unwrap();
        assert_eq!(
            (name.kind.as_str(), name.device.as_str()),
            ("nvidia.com/gpu", "0:1")
        );
        assert_eq!(name.to_string(), "nvidia.com/gpu=0:1");
    }

    #[test]
    fn what_is_not_a_qualified_name_is_refused() {
        for text in [
            "",
            "gpu0",
            "/dev/null",
            "a/b",
            "a/b=",
            "=x",
            "a/=x",
            "/b=x",
            "1a/b=x",
            "a/b=x-",
            "a/b=x y",
            "a/b/c=d",
            "a/b=../x",
        ] {
            assert!(text.parse::<QualifiedName>().is_err(), "{text}");
        }
    }
}

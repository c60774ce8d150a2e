//! `RUN --device=name[,required]`: a CDI device, and the forms of its name. Nothing in it is expanded, by the rule of the
//! language. Which devices there are is nobody's business here.

use super::csv;
use crate::error::Problem;
use crate::suggest::nearest;
use serde::{Serialize, Serializer};
use std::fmt;
use std::str::FromStr;

/// A CDI device that a RUN asks for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Device {
    /// Which.
    pub name: DeviceName,
    /// Fail where the machine has no such device; else the command runs without it.
    pub required: bool,
}

/// Which devices of the machine's CDI files are meant.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DeviceName {
    /// `vendor.com/class=name`: that one.
    One {
        /// `vendor.com/class`.
        kind: String,
        /// The device within the kind.
        device: String,
    },
    /// `vendor.com/class`: the first of the kind.
    First(String),
    /// `vendor.com/class=*`: all of the kind.
    All(String),
    /// Anything without a slash: those whose CDI file puts them into this class by an annotation.
    Class(String),
}

/// What does not name a device.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the sentence says it
#[non_exhaustive]
pub enum DeviceNameError {
    #[error("it has no name")]
    Empty,
    #[error("variables are not expanded in the name of a device")]
    Variable,
    #[error("a device is given by its name in a CDI file, vendor.com/class=name, not by a path")]
    Path,
    #[error("a device is named vendor.com/class=name")]
    NoKind,
    #[error("the {part} {text:?} {reason}")]
    Part {
        part: &'static str,
        text: String,
        reason: &'static str,
    },
}

impl FromStr for DeviceName {
    type Err = DeviceNameError;

    fn from_str(text: &str) -> Result<DeviceName, DeviceNameError> {
        match text.chars().next() {
            None => return Err(DeviceNameError::Empty),
            Some('/' | '.') => return Err(DeviceNameError::Path),
            _ if text.contains('$') => return Err(DeviceNameError::Variable),
            _ => {}
        }
        let (kind, device) = match text.split_once('=') {
            Some((kind, device)) => (kind, Some(device)),
            None => (text, None),
        };
        let Some((vendor, class)) = kind.split_once('/') else {
            if device.is_some() {
                return Err(DeviceNameError::NoKind);
            }
            part("class", text, char::is_alphanumeric, "_-.:")?;
            return Ok(DeviceName::Class(text.to_owned()));
        };
        // The rules of the CDI specification.
        part("vendor", vendor, |c| c.is_ascii_alphabetic(), "_-.")?;
        part("class", class, |c| c.is_ascii_alphabetic(), "_-.")?;
        let kind = kind.to_owned();
        match device {
            None => Ok(DeviceName::First(kind)),
            Some("*") => Ok(DeviceName::All(kind)),
            Some(device) => {
                part("device", device, |c| c.is_ascii_alphanumeric(), "_-.:")?;
                let device = device.to_owned();
                Ok(DeviceName::One { kind, device })
            }
        }
    }
}

fn part(
    part: &'static str,
    text: &str,
    first: impl Fn(char) -> bool,
    inner: &str,
) -> Result<(), DeviceNameError> {
    let inside = |c: char| c.is_ascii_alphanumeric() || inner.contains(c);
    let reason = match (text.chars().next(), text.chars().last()) {
        (None, _) => "is empty",
        (Some(c), _) if !first(c) => "begins with a character it may not begin with",
        _ if !text.chars().all(inside) => "has a character it may not have",
        (_, Some(c)) if !c.is_ascii_alphanumeric() => "does not end in a letter or digit",
        _ => return Ok(()),
    };
    Err(DeviceNameError::Part {
        part,
        text: text.to_owned(),
        reason,
    })
}

impl fmt::Display for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DeviceName::One { kind, device } => write!(f, "{kind}={device}"),
            DeviceName::First(kind) => write!(f, "{kind}"),
            DeviceName::All(kind) => write!(f, "{kind}=*"),
            DeviceName::Class(class) => write!(f, "{class}"),
        }
    }
}

impl Serialize for DeviceName {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

const KEYS: [&str; 2] = ["name", "required"];

impl Device {
    /// Reads `name[,required]`, `name=…,required=true`.
    pub(super) fn read(text: &str) -> Result<Device, Problem> {
        let bad = |reason: String| Problem::BadDevice {
            device: text.to_owned(),
            reason,
        };
        let (mut name, mut required) = (String::new(), false);
        for field in csv::fields(text).map_err(|r| bad(r.to_owned()))? {
            let (key, value) = match field.split_once('=') {
                Some((key, value)) => (key.to_ascii_lowercase(), Some(value)),
                None => (field.to_ascii_lowercase(), None),
            };
            match (key.as_str(), value) {
                ("required", None) => required = true,
                ("required", Some(value)) => {
                    required =
                        csv::parse_bool(value).ok_or_else(|| bad(format!("invalid required {value:?}")))?;
                }
                ("name", Some(value)) if name.is_empty() => value.clone_into(&mut name),
                ("name", _) => return Err(bad("it has two names".to_owned())),
                // A CDI name holds a `=` of its own: vendor.com/class=name.
                _ if name.is_empty() => name = field,
                _ if field.contains('/') => return Err(bad("it has two names".to_owned())),
                (key, _) => return Err(bad(format!("unknown key {key:?}{}", nearest(key, KEYS)))),
            }
        }
        let name = name.parse().map_err(|e: DeviceNameError| {
            let key = name.split('=').next().unwrap_or_default();
            let slip = match e {
                DeviceNameError::NoKind => nearest(key, KEYS).to_string(),
                _ => String::new(),
            };
            bad(format!("{e}{slip}"))
        })?;
        Ok(Device { name, required })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<(String, bool), String> {
        match Device::read(text) {
            Ok(device) => Ok((device.name.to_string(), device.required)),
            Err(Problem::BadDevice { reason, .. }) => Err(reason),
            Err(other) => panic!("{other:?}"),
        }
    }

    #[test]
    fn names_hold_equal_signs() {
        for (text, name, required) in [
            ("nvidia.com/gpu=all", "nvidia.com/gpu=all", false),
            ("nvidia.com/gpu,required", "nvidia.com/gpu", true),
            ("name=a.b/c=d,required=false", "a.b/c=d", false),
            ("required,name=a.b/c=0:1", "a.b/c=0:1", true),
            ("NAME=a.b/c=*,Required=1", "a.b/c=*", true),
            ("class1", "class1", false),
        ] {
            assert_eq!(read(text), Ok((name.to_owned(), required)), "{text}");
        }
    }

    #[test]
    fn a_name_says_which_devices_are_meant() {
        let of = |text: &str| text.parse::<DeviceName>();
        assert_eq!(of("a.b/c"), Ok(DeviceName::First("a.b/c".to_owned())));
        assert_eq!(of("a.b/c=*"), Ok(DeviceName::All("a.b/c".to_owned())));
        assert_eq!(of("fast"), Ok(DeviceName::Class("fast".to_owned())));
        let (kind, device) = ("a.b/c".to_owned(), "GPU-1:2".to_owned());
        assert_eq!(of("a.b/c=GPU-1:2"), Ok(DeviceName::One { kind, device }));
    }

    #[test]
    fn what_names_no_device_is_refused_with_the_reason() {
        for (text, want) in [
            ("", "no name"),
            ("required", "no name"),
            ("name=", "no name"),
            ("a.b/c=d,name=a.b/c=e", "two names"),
            ("a.b/c=d,a.b/c=e", "two names"),
            (
                "a.b/c,requierd=true",
                "unknown key \"requierd\" (did you mean required?)",
            ),
            ("a.b/c,b", "unknown key \"b\""),
            ("a.b/c,required=perhaps", "invalid required \"perhaps\""),
            ("/dev/nvidia0", "not by a path"),
            ("nvidia.com/gpu=$GPU", "variables are not expanded"),
            ("gpu=0", "vendor.com/class=name"),
            ("nme=a.b/c=d", "vendor.com/class=name (did you mean name?)"),
            ("a.b/c=", "the device \"\" is empty"),
            ("a.b/c/d=e", "the class \"c/d\" has a character"),
            ("1a/b=c", "the vendor \"1a\" begins"),
            ("a/b=c-", "the device \"c-\" does not end"),
            ("a/b=**", "the device \"**\" begins"),
        ] {
            let said = read(text).unwrap_err();
            assert!(said.contains(want), "{text}: {said}");
        }
    }
}

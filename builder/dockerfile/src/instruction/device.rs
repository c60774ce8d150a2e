//! `RUN --device=name[,required]`: a CDI device.

use super::csv;
use crate::error::Problem;
use crate::suggest::nearest;
use serde::Serialize;

/// A CDI device that a RUN asks for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Device {
    /// `vendor.com/class=name`, or a class alone.
    pub name: String,
    /// Fail where the machine has no such device.
    pub required: bool,
}

impl Device {
    /// Reads `name[,required]`, `name=…,required=true`.
    pub(super) fn read(text: &str) -> Result<Device, Problem> {
        let bad = |reason: String| Problem::BadDevice {
            device: text.to_owned(),
            reason,
        };
        let mut device = Device {
            name: String::new(),
            required: false,
        };
        for field in csv::fields(text).map_err(|r| bad(r.to_owned()))? {
            let (key, value) = match field.split_once('=') {
                Some((key, value)) => (key.to_ascii_lowercase(), Some(value)),
                None => (field.to_ascii_lowercase(), None),
            };
            match (key.as_str(), value) {
                ("required", None) => device.required = true,
                ("required", Some(value)) => {
                    device.required =
                        csv::parse_bool(value).ok_or_else(|| bad(format!("invalid required {value:?}")))?;
                }
                ("name", Some(value)) if device.name.is_empty() => device.name = value.to_owned(),
                ("name", _) => return Err(bad("it has two names".to_owned())),
                // A CDI name holds a `=` of its own: vendor.com/class=name.
                _ if device.name.is_empty() => device.name = field,
                (_, None) => return Err(bad(format!("{field} needs a value"))),
                (key, _) => {
                    return Err(bad(format!(
                        "unknown key {key:?}{}",
                        nearest(key, ["name", "required"])
                    )));
                }
            }
        }
        match device.name.is_empty() {
            true => Err(bad("it has no name".to_owned())),
            false => Ok(device),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_hold_equal_signs() {
        let read = |text: &str| Device::read(text).map(|d| (d.name, d.required));
        assert_eq!(
            read("nvidia.com/gpu=all"),
            Ok(("nvidia.com/gpu=all".into(), false))
        );
        assert_eq!(
            read("nvidia.com/gpu,required"),
            Ok(("nvidia.com/gpu".into(), true))
        );
        assert_eq!(read("name=a.b/c=d,required=false"), Ok(("a.b/c=d".into(), false)));
        for text in ["", "required", "a,name=b", "a,requierd=true", "a,b"] {
            assert!(read(text).is_err(), "{text}");
        }
    }
}

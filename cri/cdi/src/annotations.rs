//! Devices asked for by annotation, as device plugins did before the CRI had a field for them, and as containerd and CRI-O
//! read them: `cdi.k8s.io/<anything>: vendor/class=a,vendor/class=b`. Pure.

use std::collections::BTreeMap;

use crate::name::{NameError, QualifiedName};

/// What the keys of such annotations begin with.
pub const ANNOTATION_PREFIX: &str = "cdi.k8s.io/";

/// An annotation that does not name devices.
#[derive(Debug, thiserror::Error)]
#[error("annotation {key}")]
pub struct AnnotationError {
    /// Its key.
    pub key: String,
    /// What is wrong with its value.
    #[source]
    pub source: NameError,
}

/// The devices that a container's annotations name, in the order of the keys.
///
/// # Errors
/// A value with something in it that is no device's name.
pub fn devices_in_annotations(
    annotations: &BTreeMap<String, String>,
) -> Result<Vec<String>, AnnotationError> {
    let mut devices = Vec::new();
    for (key, value) in annotations
        .iter()
        .filter(|(key, _)| key.starts_with(ANNOTATION_PREFIX))
    {
        for name in value.split(',') {
            let parsed: Result<QualifiedName, NameError> = name.parse();
            let name = parsed.map_err(|source| AnnotationError {
                key: key.clone(),
                source,
            })?;
            devices.push(name.to_string());
        }
    }
    Ok(devices)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn devices(list: &[(&str, &str)]) -> Result<Vec<String>, AnnotationError> {
        let map = list
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
            .collect();
        devices_in_annotations(&map)
    }

    #[test]
    fn annotations_of_the_prefix_name_devices_and_others_do_not() {
        let got = devices(&[
            ("cdi.k8s.io/b_plugin", "v.com/c=0,v.com/c=1"),
            ("cdi.k8s.io/a", "w.com/d=x"),
            ("example.com/cdi.k8s.io", "v.com/c=2"),
        ]);
        assert_eq!(got.unwrap(), ["w.com/d=x", "v.com/c=0", "v.com/c=1"]);
        assert!(devices(&[]).unwrap().is_empty());
    }

    #[test]
    fn a_value_that_names_no_device_is_an_error_that_names_its_key() {
        for value in ["", "gpu0", "v.com/c=0,", "v.com/c=0, v.com/c=1", "v.com/../c=0"] {
            let error = devices(&[("cdi.k8s.io/x", value)]).unwrap_err();
            assert_eq!(error.key, "cdi.k8s.io/x", "{value:?}");
        }
    }
}

//! From the wire to checked values. What a request may say is decided here; what it means is not.
//!
//! Every refusal names the field as the CRI spells it.

use std::path::{Component, Path, PathBuf};

use slipway_cri_api::v1;
use slipway_image::{AuthFields, Credentials};

use crate::model::{ImageSpec, StringMap};

mod container;
pub mod filter;
mod pod;
mod resources;
mod security;

pub use container::container_config;
pub use pod::{pod_config, sandbox_config};
pub use resources::resources;

/// A request that cannot be taken at its word.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {reason}")]
pub struct Invalid {
    pub field: &'static str,
    pub reason: String,
}

fn invalid(field: &'static str, reason: impl Into<String>) -> Invalid {
    Invalid {
        field,
        reason: reason.into(),
    }
}

/// Longer than any name of Kubernetes, and than critest's.
const LONGEST_NAME: usize = 1024;

/// Part of a name: it goes into logs, errors and plugins' arguments. May be empty.
pub fn name(field: &'static str, text: String) -> Result<String, Invalid> {
    if text.len() > LONGEST_NAME {
        return Err(invalid(
            field,
            format!("{} bytes, more than {LONGEST_NAME}", text.len()),
        ));
    }
    if text.chars().any(char::is_control) {
        return Err(invalid(field, format!("{} has control characters", shown(&text))));
    }
    Ok(text)
}

/// Longer than any id of ours.
const LONGEST_ID: usize = 128;

/// The id of a pod or container, or the beginning of one.
pub fn id(field: &'static str, text: String) -> Result<String, Invalid> {
    if text.is_empty() {
        return Err(invalid(field, "is empty"));
    }
    optional_id(field, text)
}

/// The same, where none means any.
fn optional_id(field: &'static str, text: String) -> Result<String, Invalid> {
    if text.len() > LONGEST_ID || text.chars().any(|c| c.is_control() || c == '/') {
        return Err(invalid(field, format!("{} is no id", shown(&text))));
    }
    Ok(text)
}

/// Of labels and annotations together, in keys and values; four times what Kubernetes allows an object's annotations.
const LARGEST_MAP: usize = 1 << 20;

/// Labels, annotations: any text, within bounds.
fn bounded_map(field: &'static str, map: StringMap) -> Result<StringMap, Invalid> {
    let size: usize = map.iter().map(|(key, value)| key.len() + value.len()).sum();
    if size > LARGEST_MAP {
        return Err(invalid(field, format!("{size} bytes, more than {LARGEST_MAP}")));
    }
    match map
        .keys()
        .find(|key| key.is_empty() || key.chars().any(char::is_control))
    {
        Some(key) => Err(invalid(
            field,
            format!("the key {} is empty or has control characters", shown(key)),
        )),
        None => Ok(map),
    }
}

/// As much of a text as a log line has of it.
pub fn clip(text: &str) -> &str {
    const MOST: usize = 256;
    &text[..text.floor_char_boundary(MOST)]
}

/// A text as an error shows it: quoted, and not megabytes of it.
fn shown(text: &str) -> String {
    const MOST: usize = 128;
    match text.char_indices().nth(MOST) {
        Some((at, _)) => format!("{:?}…", &text[..at]),
        None => format!("{text:?}"),
    }
}

/// An image as a request names it; what the name means is found out when it is resolved.
pub fn image_spec(field: &'static str, spec: v1::ImageSpec) -> Result<ImageSpec, Invalid> {
    Ok(ImageSpec {
        image: image_name(field, spec.image)?,
        annotations: within("annotations", bounded_map(field, spec.annotations))?,
        user_specified_image: within("user_specified_image", name(field, spec.user_specified_image))?,
        runtime_handler: within("runtime_handler", name(field, spec.runtime_handler))?,
        image_ref: within("image_ref", name(field, spec.image_ref))?,
    })
}

/// The same in a filter: one without a name means every image.
fn optional_image_spec(field: &'static str, spec: v1::ImageSpec) -> Result<Option<ImageSpec>, Invalid> {
    if !spec.image.is_empty() {
        return image_spec(field, spec).map(Some);
    }
    let any = "any".to_owned();
    image_spec(field, v1::ImageSpec { image: any, ..spec }).map(|_| None)
}

/// Names the part of a field that an error is about.
fn within<T>(part: &'static str, result: Result<T, Invalid>) -> Result<T, Invalid> {
    result.map_err(|e| invalid(e.field, format!("{part}: {}", e.reason)))
}

/// A reference or an id: one word, of bounded length.
pub fn image_name(field: &'static str, text: String) -> Result<String, Invalid> {
    if text.is_empty() {
        return Err(invalid(field, "is missing"));
    }
    let climbs = text.starts_with('/') || text.split('/').any(|part| matches!(part, "." | ".."));
    if climbs || text.len() > LONGEST_NAME || text.chars().any(|c| c.is_control() || c.is_whitespace()) {
        return Err(invalid(field, format!("{} is no image's name", shown(&text))));
    }
    Ok(text)
}

/// What the kubelet sends of an image pull secret. They are never logged.
pub fn credentials(auth: v1::AuthConfig) -> Result<Option<Credentials>, Invalid> {
    const LONGEST: usize = 64 << 10;
    for (field, value) in [
        ("auth.username", &auth.username),
        ("auth.password", &auth.password),
        ("auth.auth", &auth.auth),
        ("auth.server_address", &auth.server_address),
        ("auth.identity_token", &auth.identity_token),
        ("auth.registry_token", &auth.registry_token),
    ] {
        if value.len() > LONGEST {
            let size = value.len();
            return Err(invalid(field, format!("{size} bytes, more than {LONGEST}")));
        }
    }
    // These become a line of a request as they are.
    for (field, token) in [
        ("auth.identity_token", &auth.identity_token),
        ("auth.registry_token", &auth.registry_token),
    ] {
        if token.chars().any(char::is_control) {
            return Err(invalid(field, "has control characters"));
        }
    }
    let fields = AuthFields {
        username: &auth.username,
        password: &auth.password,
        auth: &auth.auth,
        identity_token: &auth.identity_token,
        registry_token: &auth.registry_token,
    };
    Credentials::from_fields(&fields).map_err(|error| invalid("auth", error.to_string()))
}

/// A command for ExecSync.
pub fn command(cmd: Vec<String>) -> Result<Vec<String>, Invalid> {
    if cmd.is_empty() || cmd[0].is_empty() {
        return Err(invalid("cmd", "is empty"));
    }
    words("cmd", &cmd)?;
    Ok(cmd)
}

/// execve(2): one argument or variable has 32 pages at most, its end included; all together, a quarter of the stack.
const LONGEST_WORD: usize = 131_071;
const MOST_WORDS: usize = 2 << 20;

/// What is handed to execve(2): a command, its arguments.
fn words(field: &'static str, words: &[String]) -> Result<(), Invalid> {
    if words.iter().any(|word| word.contains('\0')) {
        return Err(invalid(field, "an argument has a NUL byte"));
    }
    sizes(field, words.iter().map(String::len))
}

fn sizes(field: &'static str, sizes: impl Iterator<Item = usize>) -> Result<(), Invalid> {
    let (mut longest, mut all) = (0, 0usize);
    for size in sizes {
        longest = longest.max(size);
        all = all.saturating_add(size);
    }
    if longest > LONGEST_WORD || all > MOST_WORDS {
        return Err(invalid(
            field,
            format!(
                "the longest has {longest} bytes and all together {all}; the kernel takes {LONGEST_WORD} and {MOST_WORDS}"
            ),
        ));
    }
    Ok(())
}

/// The ports that a client says it will ask for.
pub fn ports(field: &'static str, ports: &[i32]) -> Result<(), Invalid> {
    match ports.iter().find(|port| !(1..=65_535).contains(*port)) {
        Some(port) => Err(invalid(field, format!("{port} is no port"))),
        None => Ok(()),
    }
}

/// Annotations that come with a request and change nothing.
pub fn annotations(field: &'static str, map: StringMap) -> Result<(), Invalid> {
    bounded_map(field, map).map(drop)
}

/// One of an enumeration's values in a filter.
pub fn known<E: TryFrom<i32>>(field: &'static str, value: i32) -> Result<E, Invalid> {
    E::try_from(value).map_err(|_| unknown_enum(field, value))
}

/// Seconds; negative ones are refused, 0 means none.
pub fn seconds(field: &'static str, value: i64) -> Result<u64, Invalid> {
    u64::try_from(value).map_err(|_| invalid(field, format!("{value} is negative")))
}

fn optional_absolute(field: &'static str, text: &str) -> Result<Option<PathBuf>, Invalid> {
    if text.is_empty() {
        return Ok(None);
    }
    let path = Path::new(text);
    if !path.is_absolute() || text.contains('\0') || path.components().any(|c| c == Component::ParentDir) {
        return Err(invalid(
            field,
            format!("{} is not an absolute path without \"..\"", shown(text)),
        ));
    }
    path_length(field, text)?;
    Ok(Some(path.to_owned()))
}

/// PATH_MAX and NAME_MAX of limits.h: the kernel takes nothing longer.
fn path_length(field: &'static str, text: &str) -> Result<(), Invalid> {
    if text.len() > 4095 || text.split('/').any(|part| part.len() > 255) {
        return Err(invalid(
            field,
            format!(
                "{} is longer than a path, or one of its names, may be",
                shown(text)
            ),
        ));
    }
    Ok(())
}

fn unknown_enum(field: &'static str, value: i32) -> Invalid {
    invalid(field, format!("{value} is no value of its enumeration"))
}

/// What the tests of every part begin with.
#[cfg(test)]
mod samples {
    use super::*;
    use crate::config::Runtime;
    use crate::model::{ContainerConfig, PodConfig};

    pub(super) fn runtime() -> Runtime {
        crate::config::Config::load(&crate::cli::Flags {
            config: Some("/dev/null".into()),
            ..Default::default()
        })
        .unwrap()
        .runtime
    }

    pub(super) fn minimal_pod() -> v1::PodSandboxConfig {
        v1::PodSandboxConfig {
            metadata: Some(v1::PodSandboxMetadata {
                name: "p".into(),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    pub(super) fn minimal_container() -> v1::ContainerConfig {
        v1::ContainerConfig {
            metadata: Some(v1::ContainerMetadata {
                name: "c".into(),
                attempt: 0,
            }),
            image: Some(v1::ImageSpec {
                image: "busybox".into(),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    pub(super) fn pod_field(change: impl FnOnce(&mut v1::PodSandboxConfig)) -> Result<PodConfig, Invalid> {
        let mut pod = minimal_pod();
        change(&mut pod);
        pod_config(Some(pod), String::new(), &runtime())
    }

    pub(super) fn container_field(
        change: impl FnOnce(&mut v1::ContainerConfig),
    ) -> Result<ContainerConfig, Invalid> {
        let mut container = minimal_container();
        change(&mut container);
        container_config(Some(container))
    }
}

#[cfg(test)]
mod tests {
    use super::samples::{container_field, minimal_pod, pod_field, runtime};
    use super::*;

    #[test]
    fn a_missing_config_or_metadata_is_named() {
        assert_eq!(
            pod_config(None, String::new(), &runtime()).unwrap_err().field,
            "config"
        );
        assert_eq!(
            pod_field(|p| p.metadata = None).unwrap_err().field,
            "config.metadata"
        );
        assert_eq!(container_config(None).unwrap_err().field, "config");
        assert_eq!(
            container_field(|c| c.image = None).unwrap_err().field,
            "config.image"
        );
    }

    #[test]
    fn an_unknown_runtime_handler_is_refused_and_our_own_name_is_not() {
        assert_eq!(
            pod_config(Some(minimal_pod()), "kata".into(), &runtime())
                .unwrap_err()
                .field,
            "runtime_handler"
        );
        pod_config(Some(minimal_pod()), "slipway".into(), &runtime()).unwrap();
    }

    #[test]
    fn names_maps_and_numbers_out_of_bounds_are_refused_by_field() {
        let pod = |change: &dyn Fn(&mut v1::PodSandboxConfig)| pod_field(|p| change(p)).unwrap_err().field;
        let metadata =
            |p: &mut v1::PodSandboxConfig, name: &str| p.metadata.as_mut().unwrap().name = name.into();
        assert_eq!(pod(&|p| metadata(p, "a\nb")), "config.metadata.name");
        assert_eq!(pod(&|p| metadata(p, &"x".repeat(2000))), "config.metadata.name");
        let large = || StringMap::from([("note".to_owned(), "x".repeat(10 << 20))]);
        assert_eq!(pod(&|p| p.annotations = large()), "config.annotations");
        assert_eq!(
            pod(&|p| p.labels = StringMap::from([("a\nb".into(), String::new())])),
            "config.labels"
        );
        assert_eq!(
            pod(&|p| p.log_directory = "/var/log/../../etc".into()),
            "config.log_directory"
        );
        assert_eq!(
            pod(&|p| p.log_directory = "/var/log/a\nb".into()),
            "config.log_directory"
        );
        assert_eq!(pod(&|p| p.hostname = "a/b".into()), "config.hostname");
        let limits = |change: &dyn Fn(&mut v1::LinuxContainerResources)| {
            let mut resources = v1::LinuxContainerResources::default();
            change(&mut resources);
            let linux = v1::LinuxContainerConfig {
                resources: Some(resources),
                ..Default::default()
            };
            container_field(|c| c.linux = Some(linux))
                .unwrap_err()
                .to_string()
        };
        for (text, field) in [
            (limits(&|r| r.memory_limit_in_bytes = -5), "memory_limit_in_bytes"),
            (limits(&|r| r.cpu_period = -1), "cpu_period"),
            (limits(&|r| r.cpu_shares = -1), "cpu_shares"),
            (limits(&|r| r.oom_score_adj = 1001), "oom_score_adj"),
        ] {
            assert!(
                text.starts_with("config.linux.resources: ") && text.contains(field),
                "{text}"
            );
        }
        assert_eq!(
            container_field(|c| c.annotations = large()).unwrap_err().field,
            "config.annotations"
        );
        assert_eq!(
            container_field(|c| c.command = vec!["a\0".into()])
                .unwrap_err()
                .field,
            "config.command"
        );
    }

    #[test]
    fn an_error_about_a_long_text_is_short() {
        let error = pod_field(|p| p.hostname = "x".repeat(1 << 20)).unwrap_err();
        assert!(error.reason.len() < 300, "{} bytes", error.reason.len());
    }
}

//! What the shim itself reads of a bundle's config.json. Everything else in it is the worker's.

use serde::Deserialize;
use serde::de::IgnoredAny;
use slipway_sys::cgroup::{CgroupPath, Resources};
use slipway_sys::exec::Process;
use std::collections::BTreeMap;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

/// Longer files than this are no configs.
const MAX_CONFIG: u64 = 16 << 20;

/// Allocations of at least this many bytes are mappings of their own in musl.
pub const GIVEN_BACK: usize = 132 * 1024;

/// A bundle whose config cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// It cannot be read.
    #[error("read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is no OCI runtime spec.
    #[error("decode {}", path.display())]
    Decode {
        /// The file.
        path: PathBuf,
        /// Why.
        source: serde_json::Error,
    },
    /// It lacks something.
    #[error("{} says nothing about {what}", path.display())]
    Lacks {
        /// The file.
        path: PathBuf,
        /// What is missing.
        what: &'static str,
    },
    /// The container has a seccomp filter whose compiled form is not there: an exec would be less confined than init.
    #[error("the container's seccomp filter {} cannot be read, so nothing is run without it", path.display())]
    Seccomp {
        /// Where it should be.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

#[derive(Deserialize)]
struct ForCreate {
    #[serde(default)]
    process: Ids,
    #[serde(default)]
    linux: LinuxForCreate,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct LinuxForCreate {
    cgroups_path: Option<String>,
    resources: Option<Resources>,
    uid_mappings: Vec<Mapping>,
    gid_mappings: Vec<Mapping>,
}

impl LinuxForCreate {
    fn on_host(&self, uid: u32, gid: u32) -> (u32, u32) {
        let map = |maps: &[Mapping], id: u32| {
            let within = |m: &&Mapping| id >= m.container_id && id - m.container_id < m.size;
            maps.iter()
                .find(within)
                .map_or(id, |m| m.host_id.saturating_add(id - m.container_id))
        };
        (map(&self.uid_mappings, uid), map(&self.gid_mappings, gid))
    }
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Ids {
    user: User,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct User {
    uid: u32,
    gid: u32,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Mapping {
    #[serde(rename = "containerID")]
    container_id: u32,
    #[serde(rename = "hostID")]
    host_id: u32,
    size: u32,
}

/// What creating a container needs.
#[derive(Debug)]
pub struct Created {
    /// Where its cgroup shall be, as the spec spells it; absent: nothing is said.
    pub cgroups_path: Option<String>,
    /// Its limits.
    pub resources: Resources,
    /// The user and group its process runs as, as the host sees them.
    pub owner: (u32, u32),
}

/// What running another process in the container needs.
#[derive(Debug)]
pub struct ForExec {
    /// How its init runs.
    pub process: Process,
    /// The compiled filter's file, when it has one.
    pub seccomp: Option<Vec<u8>>,
}

#[derive(Deserialize)]
struct ExecConfig {
    process: Option<Process>,
    #[serde(default)]
    linux: LinuxForExec,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct LinuxForExec {
    seccomp: Option<IgnoredAny>,
}

#[derive(Deserialize)]
struct Annotated {
    #[serde(default)]
    annotations: BTreeMap<String, String>,
}

/// Reads what creating a container needs.
///
/// # Errors
/// [`SpecError`]
pub fn for_create(bundle: &Path) -> Result<Created, SpecError> {
    let config: ForCreate = decode(&bundle.join("config.json"))?;
    let user = config.process.user;
    let owner = config.linux.on_host(user.uid, user.gid);
    Ok(Created {
        cgroups_path: config.linux.cgroups_path.filter(|p| !p.is_empty()),
        resources: config.linux.resources.unwrap_or_default(),
        owner,
    })
}

/// A container's user and group as the host sees them.
///
/// # Errors
/// [`SpecError`]
pub fn host_ids(bundle: &Path, uid: u32, gid: u32) -> Result<(u32, u32), SpecError> {
    let config: ForCreate = decode(&bundle.join("config.json"))?;
    Ok(config.linux.on_host(uid, gid))
}

/// Reads what an exec needs.
///
/// # Errors
/// [`SpecError`]
pub fn for_exec(bundle: &Path) -> Result<ForExec, SpecError> {
    let path = bundle.join("config.json");
    let config: ExecConfig = decode(&path)?;
    let process = config.process.ok_or(SpecError::Lacks {
        path,
        what: "a process",
    })?;
    let seccomp = match config.linux.seccomp {
        None => None,
        Some(IgnoredAny) => {
            let path = bundle.join("seccomp.bpf");
            Some(read(&path).map_err(|source| SpecError::Seccomp { path, source })?)
        }
    };
    Ok(ForExec { process, seccomp })
}

/// A container's annotations.
///
/// # Errors
/// [`SpecError`]
pub fn annotations(bundle: &Path) -> Result<BTreeMap<String, String>, SpecError> {
    decode::<Annotated>(&bundle.join("config.json")).map(|config| config.annotations)
}

fn decode<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T, SpecError> {
    let text = read(path).map_err(|source| SpecError::Read {
        path: path.to_owned(),
        source,
    })?;
    serde_json::from_slice(&text).map_err(|source| SpecError::Decode {
        path: path.to_owned(),
        source,
    })
}

/// A file of a bundle. The buffer is of a size that the allocator gives back to the system: a pod's shim is alive for weeks,
/// and reads these for milliseconds.
fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut text = Vec::with_capacity(GIVEN_BACK);
    std::fs::File::open(path)?
        .take(MAX_CONFIG)
        .read_to_end(&mut text)?;
    Ok(text)
}

/// The cgroup of a container whose spec names none.
pub fn default_cgroup(id: &str) -> CgroupPath {
    CgroupPath::Fs(PathBuf::from("/slipway").join(id))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bundle(config: &str) -> tempfile::TempDir {
        let dir = tempfile::tempdir().expect("a directory");
        std::fs::write(dir.path().join("config.json"), config).expect("written");
        dir
    }

    #[test]
    fn the_owner_is_the_process_user_seen_through_the_id_maps() {
        let dir = bundle(
            r#"{"ociVersion":"1.2.0","process":{"user":{"uid":1000,"gid":5}},"linux":{"cgroupsPath":"/a/b",
            "uidMappings":[{"containerID":0,"hostID":100000,"size":65536}]}}"#,
        );
        let spec = for_create(dir.path()).expect("a config");
        assert_eq!(spec.owner, (101_000, 5));
        assert_eq!(spec.cgroups_path.as_deref(), Some("/a/b"));
    }

    #[test]
    fn a_filter_without_its_compiled_form_forbids_exec() {
        let dir = bundle(
            r#"{"process":{"args":["sh"],"cwd":"/"},"linux":{"seccomp":{"defaultAction":"SCMP_ACT_ALLOW"}}}"#,
        );
        assert!(matches!(for_exec(dir.path()), Err(SpecError::Seccomp { .. })));
        std::fs::write(dir.path().join("seccomp.bpf"), b"1234").expect("written");
        assert_eq!(
            for_exec(dir.path()).expect("a config").seccomp.as_deref(),
            Some(&b"1234"[..])
        );
    }

    #[test]
    fn a_config_that_is_none_says_which_file() {
        let dir = bundle("[");
        let error = for_create(dir.path()).expect_err("no config");
        assert!(error.to_string().contains("config.json"), "{error}");
        assert!(matches!(
            annotations(Path::new("/nonexistent")),
            Err(SpecError::Read { .. })
        ));
    }
}

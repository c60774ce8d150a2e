//! Where the driver is, and its device nodes.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

/// Where the driver is.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Driver {
    /// Its root.
    pub root: PathBuf,
    /// Its device nodes; empty: `dev` below the root, or the machine's where the root has none.
    pub dev: PathBuf,
    /// libnvidia-ml; empty: looked for.
    pub library: PathBuf,
    /// How long NVML may take.
    pub deadline_ms: u64,
}

impl Default for Driver {
    fn default() -> Driver {
        Driver {
            root: "/".into(),
            dev: PathBuf::new(),
            library: PathBuf::new(),
            deadline_ms: 5000,
        }
    }
}

impl Driver {
    /// Its folder of device nodes: as configured, or as it is now.
    pub fn dev_dir(&self) -> PathBuf {
        if self.dev.as_os_str().is_empty() {
            nodes_of(&self.root, Path::new("/dev"))
        } else {
            self.dev.clone()
        }
    }

    /// How long NVML may take.
    pub fn deadline(&self) -> Duration {
        Duration::from_millis(self.deadline_ms)
    }
}

/// Where the nodes of the driver at `root` are: a driver in a container has its own, one that is only installed there
/// (`/usr/local/nvidia`) has the machine's, in `machine`.
fn nodes_of(root: &Path, machine: &Path) -> PathBuf {
    let own = root.join("dev");
    let has = |dev: &Path| dev.join("nvidiactl").exists();
    if has(&own) || own.is_dir() && !has(machine) {
        own
    } else {
        machine.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_root_without_device_nodes_has_the_machines() {
        let dir = tempfile::tempdir().unwrap();
        let (root, machine) = (dir.path().join("root"), dir.path().join("dev"));
        let make = |path: &Path| {
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "").unwrap();
        };
        std::fs::create_dir_all(&root).unwrap();
        assert_eq!(nodes_of(&root, &machine), machine, "no dev below the root");
        std::fs::create_dir_all(root.join("dev")).unwrap();
        assert_eq!(
            nodes_of(&root, &machine),
            root.join("dev"),
            "no nodes anywhere yet"
        );
        make(&machine.join("nvidiactl"));
        assert_eq!(nodes_of(&root, &machine), machine, "an empty dev below the root");
        make(&root.join("dev/nvidiactl"));
        assert_eq!(
            nodes_of(&root, &machine),
            root.join("dev"),
            "a driver in a container"
        );
        let configured = Driver {
            root,
            dev: "/elsewhere".into(),
            ..Driver::default()
        };
        assert_eq!(configured.dev_dir(), Path::new("/elsewhere"));
    }
}

//! One test's own corner of the machine: directories, names, a bridge and a subnet that nothing else uses.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result};

static NEXT: AtomicU32 = AtomicU32::new(0);

/// A directory tree and names for one test. Removed, and proven empty of mounts, by [`Lab::finish`].
pub struct Lab {
    dir: tempfile::TempDir,
    tag: String,
    subnet: u32,
}

impl Lab {
    /// A new corner; `what` names it in paths a person reads while debugging.
    ///
    /// # Errors
    /// The directory could not be made.
    pub fn new(what: &str) -> Result<Lab> {
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let base =
            std::env::var_os("SLIPWAY_TEST_DIR").map_or_else(|| PathBuf::from("/var/tmp"), PathBuf::from);
        let dir = tempfile::Builder::new()
            .prefix(&format!("slipway-{what}-"))
            .tempdir_in(&base)
            .with_context(|| format!("making a directory in {}", base.display()))?;
        let pid = std::process::id();
        // 10.64.0.0/10 cut into /24s: by process and by test in it.
        let subnet = (pid.wrapping_mul(97) + n * 13) % (64 * 256);
        Ok(Lab {
            dir,
            tag: format!("{pid:x}-{n:x}"),
            subnet,
        })
    }

    /// The directory of this test.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// A path below it.
    pub fn join(&self, p: impl AsRef<Path>) -> PathBuf {
        self.dir.path().join(p)
    }

    /// A short name that no other test on this machine has ("1f3a-2").
    pub fn tag(&self) -> &str {
        &self.tag
    }

    /// The bridge of this test's CNI network (15 characters at most).
    pub fn bridge(&self) -> String {
        format!("sw{}", self.tag)
    }

    /// The name of this test's CNI network.
    pub fn network(&self) -> String {
        format!("slipway-test-{}", self.tag)
    }

    /// The subnet of this test's CNI network, "10.x.y.0/24".
    pub fn subnet(&self) -> String {
        format!("10.{}.{}.0/24", 64 + self.subnet / 256, self.subnet % 256)
    }

    /// A second subnet, for a peer beside ours: "10.x.y.0/24".
    pub fn second_subnet(&self) -> String {
        format!("10.{}.{}.0/24", 128 + self.subnet / 256, self.subnet % 256)
    }

    /// The cgroup parent that holds everything this test's pods make.
    pub fn cgroup(&self) -> String {
        format!("/slipway-test-{}", self.tag)
    }

    /// Writes `contents` to a file below the directory, making its parents.
    ///
    /// # Errors
    /// The file could not be written.
    pub fn write(&self, path: impl AsRef<Path>, contents: impl AsRef<[u8]>) -> Result<PathBuf> {
        let p = self.join(path);
        if let Some(parent) = p.parent() {
            std::fs::create_dir_all(parent)?;
        }
        std::fs::write(&p, contents).with_context(|| format!("writing {}", p.display()))?;
        Ok(p)
    }

    /// A conflist of bridge, host-local and portmap for this test, in a directory of its own; that directory.
    ///
    /// # Errors
    /// The file could not be written.
    pub fn write_cni_config(&self) -> Result<PathBuf> {
        let conf = serde_json::json!({
            "cniVersion": "1.0.0",
            "name": self.network(),
            "plugins": [
                { "type": "bridge", "bridge": self.bridge(), "isGateway": true, "ipMasq": true, "hairpinMode": true,
                  "ipam": { "type": "host-local", "dataDir": self.join("ipam"),
                            "ranges": [[{ "subnet": self.subnet() }]], "routes": [{ "dst": "0.0.0.0/0" }] } },
                { "type": "portmap", "capabilities": { "portMappings": true }, "snat": true }
            ]
        });
        self.write("cni/10-test.conflist", serde_json::to_vec_pretty(&conf)?)?;
        Ok(self.join("cni"))
    }

    /// Removes the bridge and the directory; says what could not be removed.
    ///
    /// # Errors
    /// A mount, process, cgroup or file of this test is still there.
    pub fn finish(self) -> Result<()> {
        crate::leftovers::remove_bridge(&self.bridge());
        // The parent of the pods' cgroups is the client's, as kubelet's are; it goes if nothing is left in it.
        for dir in crate::leftovers::cgroups_named(self.cgroup().trim_start_matches('/')) {
            let _ = std::fs::remove_dir(dir);
        }
        crate::leftovers::check(&self)?;
        let path = self.dir.path().to_owned();
        self.dir
            .close()
            .with_context(|| format!("removing {}", path.display()))
    }
}

/// Where the four programs are.
pub fn bin(name: &str) -> PathBuf {
    let dir = std::env::var_os("SLIPWAY_BIN").map_or_else(|| cache().join("target/dist"), PathBuf::from);
    dir.join(name)
}

/// A tool of the field built by tests/setup/go-tools.sh.
pub fn tool(name: &str) -> PathBuf {
    cache().join("tools/bin").join(name)
}

/// The directory of CNI plugins: the current ones from the cache, else the distribution's.
pub fn cni_bin() -> PathBuf {
    let ours = cache().join("tools/cni");
    if ours.join("bridge").exists() {
        ours
    } else {
        PathBuf::from("/usr/lib/cni")
    }
}

/// Slipway's cache outside the checkout.
pub fn cache() -> PathBuf {
    std::env::var_os("SLIPWAY_CACHE").map_or_else(
        || {
            let home = std::env::var_os("HOME").unwrap_or_else(|| "/root".into());
            PathBuf::from(home).join(".cache/slipway")
        },
        PathBuf::from,
    )
}

/// The repository's root.
pub fn repo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .map_or_else(|| PathBuf::from("."), Path::to_path_buf)
}

//! A pod's directory under the state: made, filled with the files its containers see, removed.
//!
//! ```text
//! <state>/pods/<pod id>/  0700
//!   shim.sock shim.json shim.log   the shim's
//!   ns/{user,net,ipc,uts,pid}      bind mounts, the shim's
//!   etc/                           tmpfs of 1 MiB: what containers may write to ends there, not in the host's /run
//!     resolv.conf hosts hostname   0644, bind-mounted into containers
//!   shm/                           tmpfs, unless the pod uses the host's
//! ```
//! All of it can be made anew from the record, so nothing is synced.

use std::fs::DirBuilder;
use std::net::IpAddr;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use rustix::mount::{MountFlags, UnmountFlags};

use crate::error::Error;
use crate::model::{Dns, PodConfig, Scope};

/// Bounds what is copied from the host's own files, which have to fit into [`ETC`].
const HOST_FILE_LIMIT: u64 = 256 << 10;
/// Three small files, and what containers make of them.
const ETC: &str = "mode=755,size=1m,nr_inodes=32";

/// The names in a pod's directory.
#[derive(Debug, Clone)]
pub struct PodDir {
    path: PathBuf,
}

impl PodDir {
    pub fn new(pods: &Path, id: &crate::ids::PodId) -> PodDir {
        PodDir {
            path: pods.join(id.as_str()),
        }
    }

    /// For what was found in the state directory.
    pub fn at(path: PathBuf) -> PodDir {
        PodDir { path }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn resolv_conf(&self) -> PathBuf {
        self.file("resolv.conf")
    }

    pub fn hosts(&self) -> PathBuf {
        self.file("hosts")
    }

    pub fn hostname(&self) -> PathBuf {
        self.file("hostname")
    }

    fn etc(&self) -> PathBuf {
        self.path.join("etc")
    }

    fn file(&self, name: &str) -> PathBuf {
        let etc = self.etc();
        // Pods of slipwayd 0.1 have them beside the rest.
        if etc.exists() {
            etc.join(name)
        } else {
            self.path.join(name)
        }
    }

    pub fn shm(&self) -> PathBuf {
        self.path.join("shm")
    }

    /// Makes the directory itself. The pod's id is new, so one that exists is an error.
    pub fn make(&self) -> Result<(), Error> {
        DirBuilder::new()
            .mode(0o700)
            .create(&self.path)
            .map_err(Error::io("create", &self.path))
    }

    /// Writes what does not depend on the network, mounts /dev/shm, and makes the log directory.
    pub fn fill(&self, config: &PodConfig, shm_bytes: u64) -> Result<(), Error> {
        let resolv_conf = match &config.dns {
            Some(dns) if *dns != Dns::default() => render_resolv_conf(dns),
            // Nothing said of it is the node's.
            _ => host_file(Path::new("/etc/resolv.conf"))?,
        };
        mount_tmpfs(&self.etc(), ETC)?;
        write(&self.resolv_conf(), &resolv_conf)?;
        write(&self.hostname(), &format!("{}\n", hostname(config)))?;
        if config.namespaces.ipc == Scope::Pod {
            mount_tmpfs(&self.shm(), &format!("mode=1777,size={shm_bytes}"))?;
        }
        if let Some(logs) = &config.log_directory {
            DirBuilder::new()
                .recursive(true)
                .mode(0o755)
                .create(logs)
                .map_err(Error::io("create", logs))?;
        }
        Ok(())
    }

    /// Writes /etc/hosts, once the addresses are known.
    pub fn write_hosts(&self, config: &PodConfig, addresses: &[IpAddr]) -> Result<(), Error> {
        let text = match config.namespaces.network {
            Scope::Node => host_file(Path::new("/etc/hosts"))?,
            Scope::Pod | Scope::Container => render_hosts(addresses, &hostname(config)),
        };
        write(&self.hosts(), &text)
    }

    /// Unmounts whatever is mounted below, and removes the directory. Absent is fine.
    pub fn remove(&self) -> Result<(), Error> {
        unmount_below(&self.path)?;
        slipway_snapshot::remove_tree(&self.path).map_err(Error::io("remove", &self.path))
    }
}

/// Makes a directory and mounts a tmpfs on it.
fn mount_tmpfs(target: &Path, options: &str) -> Result<(), Error> {
    DirBuilder::new()
        .mode(0o700)
        .create(target)
        .map_err(Error::io("create", target))?;
    let options = std::ffi::CString::new(options).unwrap_or_default();
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    rustix::mount::mount("shm", target, "tmpfs", flags, options.as_c_str())
        .map_err(|errno| Error::io("mount a tmpfs on", target)(errno.into()))
}

/// Unmounts everything at and below a directory.
pub fn unmount_below(dir: &Path) -> Result<(), Error> {
    let points = slipway_snapshot::mounts_under(dir).map_err(Error::io("find what is mounted in", dir))?;
    points.iter().try_for_each(|point| unmount(point))
}

/// Unmounts lazily: what still uses it keeps it, nobody new finds it. Not mounted is fine.
pub fn unmount(point: &Path) -> Result<(), Error> {
    match rustix::mount::unmount(point, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
        Ok(()) | Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => Ok(()),
        Err(errno) => Err(Error::io("unmount", point)(errno.into())),
    }
}

/// The name the pod's processes see.
pub fn hostname(config: &PodConfig) -> String {
    if config.hostname.is_empty() || config.namespaces.network == Scope::Node {
        rustix::system::uname().nodename().to_string_lossy().into_owned()
    } else {
        config.hostname.clone()
    }
}

fn render_resolv_conf(dns: &Dns) -> String {
    let mut text = String::new();
    if !dns.searches.is_empty() {
        text.push_str(&format!("search {}\n", dns.searches.join(" ")));
    }
    for server in &dns.servers {
        text.push_str(&format!("nameserver {server}\n"));
    }
    if !dns.options.is_empty() {
        text.push_str(&format!("options {}\n", dns.options.join(" ")));
    }
    text
}

fn render_hosts(addresses: &[IpAddr], hostname: &str) -> String {
    let mut text = String::from(
        "# Written by slipwayd for this pod.\n\
         127.0.0.1\tlocalhost\n\
         ::1\tlocalhost ip6-localhost ip6-loopback\n\
         fe00::0\tip6-localnet\n\
         fe00::0\tip6-mcastprefix\n\
         fe00::1\tip6-allnodes\n\
         fe00::2\tip6-allrouters\n",
    );
    for address in addresses {
        text.push_str(&format!("{address}\t{hostname}\n"));
    }
    text
}

/// A file of the host's; empty when there is none.
fn host_file(path: &Path) -> Result<String, Error> {
    use std::io::Read as _;
    let file = match std::fs::File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(String::new()),
        Err(error) => return Err(Error::io("open", path)(error)),
    };
    let mut bytes = Vec::new();
    file.take(HOST_FILE_LIMIT)
        .read_to_end(&mut bytes)
        .map_err(Error::io("read", path))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn write(path: &Path, text: &str) -> Result<(), Error> {
    std::fs::write(path, text).map_err(Error::io("write", path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;

    #[test]
    fn resolv_conf_has_the_words_of_the_dns_config() {
        let dns = Dns {
            servers: vec!["10.0.0.10".into(), "fd00::10".into()],
            searches: vec!["ns.svc.cluster.local".into(), "svc.cluster.local".into()],
            options: vec!["ndots:5".into()],
        };
        assert_eq!(
            render_resolv_conf(&dns),
            "search ns.svc.cluster.local svc.cluster.local\nnameserver 10.0.0.10\nnameserver fd00::10\noptions ndots:5\n"
        );
    }

    #[test]
    fn hosts_names_every_address_of_the_pod() {
        let text = render_hosts(&["10.1.2.3".parse().unwrap(), "fd00::3".parse().unwrap()], "web");
        assert!(text.contains("127.0.0.1\tlocalhost\n"));
        assert!(text.ends_with("10.1.2.3\tweb\nfd00::3\tweb\n"));
    }

    #[test]
    fn root_a_pods_files_are_written_in_a_bounded_place_and_removed_again() {
        if !rustix::process::geteuid().is_root() {
            return drop(writeln!(
                std::io::stderr(),
                "\n*** SKIPPED: this test needs root ***\n"
            ));
        }
        let top = tempfile::tempdir().unwrap();
        let dir = PodDir::at(top.path().join("pod"));
        let mut config = PodConfig {
            hostname: "web".into(),
            dns: Some(Dns::default()),
            ..PodConfig::default()
        };
        config.namespaces.ipc = Scope::Node;
        config.log_directory = Some(top.path().join("logs/a"));
        dir.make().unwrap();
        dir.fill(&config, 1 << 20).unwrap();
        dir.write_hosts(&config, &[]).unwrap();
        assert_eq!(std::fs::read_to_string(dir.hostname()).unwrap(), "web\n");
        assert_eq!(
            std::fs::read(dir.resolv_conf()).unwrap(),
            std::fs::read("/etc/resolv.conf").unwrap_or_default(),
            "an empty DNS configuration says nothing"
        );
        assert!(top.path().join("logs/a").is_dir());
        let full = std::fs::write(dir.hosts(), vec![b'x'; 2 << 20]).unwrap_err();
        assert_eq!(full.kind(), std::io::ErrorKind::StorageFull);
        dir.remove().unwrap();
        dir.remove().unwrap();
        assert!(!dir.path().exists());
    }
}

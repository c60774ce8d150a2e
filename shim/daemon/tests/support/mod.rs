//! A pod of a test's own: real shim, real worker, a root of busybox, a cgroup and a state directory that are seen to be gone
//! at the end.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used)]

use slipway_shim_client::{CreateContainer, Exit, Launcher, Output, Shim, Stdin, pod};
use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

pub const SHIM: &str = env!("CARGO_BIN_EXE_containerd-shim-slipway-v1");
const BUSYBOX: &str = "/bin/busybox";

/// The worker beside the shim, or nothing, loudly.
pub fn worker() -> Option<PathBuf> {
    let beside = Path::new(SHIM).with_file_name("slipway-runc");
    let path = std::env::var_os("SLIPWAY_RUNC").map_or(beside, PathBuf::from);
    if path.exists() {
        return Some(path);
    }
    let _ = writeln!(
        std::io::stderr(),
        "SKIPPED: {} is not built: cargo build -p slipway-runc",
        path.display()
    );
    None
}

/// Whether tests that need root can run, else nothing, loudly.
pub fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root() && Path::new(BUSYBOX).exists();
    if !root {
        let _ = writeln!(std::io::stderr(), "SKIPPED: this test needs root and {BUSYBOX}");
    }
    root
}

pub struct TestPod {
    pub launcher: Launcher,
    pub shim: Shim,
    pub dir: tempfile::TempDir,
    pub id: String,
    pub cgroup: String,
}

impl Drop for TestPod {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let small = self.path("small");
            let _ = slipway_sys::mount::unmount(&small, true);
            let dir = self.dir.path().to_str().expect("text");
            eprintln!(
                "{}",
                std::fs::read_to_string(self.path("shim.log")).unwrap_or_default()
            );
            let _ = std::process::Command::new(SHIM)
                .args(["cleanup", "--all", "--state-dir", dir])
                .status();
        }
    }
}

static NUMBER: AtomicU32 = AtomicU32::new(0);

/// Prepares everything and starts the shim. `None`: skipped.
pub async fn pod() -> Option<TestPod> {
    if !is_root() {
        return None;
    }
    Some(pod_with(worker()?).await)
}

pub async fn pod_with(worker: PathBuf) -> TestPod {
    let launcher = Launcher {
        shim: SHIM.into(),
        worker,
    };
    pod_by(launcher).await
}

pub async fn pod_by(launcher: Launcher) -> TestPod {
    let dir = tempfile::Builder::new()
        .prefix("slipway-test-shim-")
        .tempdir()
        .expect("a directory");
    let id = format!(
        "{}-{}",
        std::process::id(),
        NUMBER.fetch_add(1, Ordering::Relaxed)
    );
    let shim = launcher.start(&id, dir.path()).await.expect("the shim comes up");
    TestPod {
        launcher,
        shim,
        cgroup: format!("/slipway-test-{id}"),
        id,
        dir,
    }
}

impl TestPod {
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn log(&self, container: &str) -> PathBuf {
        self.path(&format!("{container}.log"))
    }

    /// The log's lines without their timestamps.
    pub fn log_lines(&self, container: &str) -> Vec<String> {
        let text = std::fs::read(self.log(container)).unwrap_or_default();
        let text = String::from_utf8_lossy(&text).into_owned();
        text.lines()
            .map(|line| line.split_once(' ').map_or(line, |(_, rest)| rest).to_owned())
            .collect()
    }

    pub async fn create_pod(
        &self,
        change: impl FnOnce(&mut pod::CreatePodRequest),
    ) -> pod::CreatePodResponse {
        let mut request = pod::CreatePodRequest {
            pod_id: self.id.clone(),
            state_dir: self.dir.path().to_str().expect("text").to_owned(),
            hostname: "test-pod".to_owned(),
            cgroup_parent: self.cgroup.clone(),
            pid: pod::NamespaceMode::None.into(),
            ..Default::default()
        };
        change(&mut request);
        self.shim.create_pod(request).await.expect("the pod is created")
    }

    /// A bundle that runs a shell script in a root of busybox.
    pub fn bundle(&self, id: &str, script: &str, change: impl FnOnce(&mut serde_json::Value)) -> PathBuf {
        let bundle = self.path(&format!("bundle-{id}"));
        let rootfs = bundle.join("rootfs");
        for sub in ["bin", "proc", "dev", "sys", "tmp", "etc"] {
            std::fs::create_dir_all(rootfs.join(sub)).expect("made");
        }
        if !rootfs.join("bin/busybox").exists() {
            std::fs::copy(BUSYBOX, rootfs.join("bin/busybox")).expect("busybox");
            for applet in [
                "sh", "sleep", "cat", "yes", "true", "id", "head", "tr", "dd", "stty", "setsid", "ps",
            ] {
                std::os::unix::fs::symlink("busybox", rootfs.join("bin").join(applet)).expect("an applet");
            }
        }
        let mut config = serde_json::json!({
            "ociVersion": "1.2.0",
            "process": {
                "terminal": false,
                "user": {"uid": 0, "gid": 0},
                "args": ["/bin/sh", "-c", script],
                "env": ["PATH=/bin"],
                "cwd": "/",
                "noNewPrivileges": true,
            },
            "root": {"path": "rootfs"},
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
                {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
                 "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"]},
            ],
            "linux": {
                "cgroupsPath": format!("{}/{id}", self.cgroup),
                "namespaces": [{"type": "mount"}, {"type": "pid"}, {"type": "ipc"}, {"type": "uts"}],
                "resources": {"devices": [{"allow": true, "access": "rwm"}]},
            },
        });
        change(&mut config);
        std::fs::write(bundle.join("config.json"), config.to_string()).expect("written");
        bundle
    }

    pub fn container(&self, id: &str, script: &str) -> CreateContainer {
        CreateContainer {
            id: id.to_owned(),
            bundle: self.bundle(id, script, |_| {}),
            stdin: Stdin::Null,
            stdout: Output::CriLog(self.log(id)),
            terminal: false,
            pid_target: None,
        }
    }

    /// Creates and starts a container that runs a script.
    pub async fn run(&self, id: &str, script: &str) -> u32 {
        let pid = self
            .shim
            .create(self.container(id, script))
            .await
            .expect("created");
        self.shim.start(id).await.expect("started");
        pid
    }

    /// Waits for a container's end.
    pub async fn exit_of(&self, id: &str) -> Exit {
        tokio::time::timeout(Duration::from_secs(60), self.shim.wait(id))
            .await
            .expect("in time")
            .expect("an exit")
    }

    /// Runs a script in a container and answers its exit code and what it wrote.
    pub async fn exec(&self, id: &str, script: &str) -> (pod::ExecResponse, String) {
        let (read, write) = pipe();
        let request = pod::ExecRequest {
            container_id: id.to_owned(),
            args: ["/bin/sh", "-c", script].map(str::to_owned).to_vec(),
            stdout: true,
            timeout_ms: 20_000,
            ..Default::default()
        };
        let (response, _) = self.shim.exec(request, vec![write]).await.expect("run");
        (response, read_available(&read))
    }

    pub async fn state(&self, id: &str) -> pod::Container {
        let info = self.shim.info().await.expect("info");
        info.containers
            .into_iter()
            .find(|c| c.id == id)
            .expect("the container")
    }

    /// Stops and releases the pod and sees that nothing is left.
    pub async fn finish(self) {
        self.shim.stop_pod().await.expect("stopped");
        for container in self.shim.info().await.expect("info").containers {
            self.shim.delete(&container.id).await.expect("deleted");
        }
        self.shim.release_pod().await.expect("released");
        let pid = self.shim.info().await.expect("info").pid;
        self.shim.shutdown().await.expect("asked to end");
        tokio::time::timeout(Duration::from_secs(5), self.shim.closed())
            .await
            .expect("ended");
        until("the shim is gone", || {
            !Path::new(&format!("/proc/{pid}")).exists()
        })
        .await;
        self.assert_nothing_left();
    }

    pub fn assert_nothing_left(&self) {
        assert_eq!(
            cgroups_of(&self.cgroup),
            Vec::<PathBuf>::new(),
            "cgroups are left"
        );
        let mounts = std::fs::read_to_string("/proc/self/mounts").expect("mounts");
        let own = self.dir.path().to_str().expect("text");
        let left: Vec<_> = mounts.lines().filter(|line| line.contains(own)).collect();
        assert!(left.is_empty(), "mounts are left: {left:?}");
    }
}

/// Directories of a cgroup path in all hierarchies.
pub fn cgroups_of(path: &str) -> Vec<PathBuf> {
    let tops = std::fs::read_dir("/sys/fs/cgroup")
        .expect("cgroups")
        .flatten()
        .map(|e| e.path());
    let own = Path::new("/sys/fs/cgroup").to_owned();
    tops.chain([own])
        .map(|top| top.join(path.trim_start_matches('/')))
        .filter(|p| p.exists())
        .collect()
}

pub fn pipe() -> (OwnedFd, OwnedFd) {
    rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).expect("a pipe")
}

/// What is in a pipe now.
pub fn read_available(fd: &OwnedFd) -> String {
    rustix::io::ioctl_fionbio(fd, true).expect("non-blocking");
    let mut all = Vec::new();
    let mut some = [0; 4096];
    while let Ok(n @ 1..) = rustix::io::read(fd, &mut some) {
        all.extend_from_slice(&some[..n]);
    }
    String::from_utf8_lossy(&all).into_owned()
}

/// A worker that is a script.
pub fn fake_worker(dir: &std::path::Path, script: &str) -> PathBuf {
    let path = dir.join("worker");
    std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(&path, mode).unwrap();
    path
}

/// Waits for something to become true.
pub async fn until(what: &str, mut is: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(10);
    while !is() {
        assert!(Instant::now() < end, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// A process's resident memory that nobody shares, in KiB.
pub fn private_kib(pid: u32) -> u64 {
    let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).expect("smaps");
    let field = |name: &str| -> u64 {
        let line = smaps.lines().find(|line| line.starts_with(name));
        line.and_then(|line| line.split_whitespace().nth(1))
            .and_then(|n| n.parse().ok())
            .unwrap_or(0)
    };
    field("Private_Dirty:") + field("Private_Clean:")
}

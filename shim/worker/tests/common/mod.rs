//! A container in a temporary bundle: made by the worker, started, looked into, and proven gone at the end.
#![allow(dead_code, clippy::unwrap_used)] // each test binary uses a part; a failure is a failed test

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use serde_json::{Value, json};
use slipway_sys::cgroup::{Cgroup, CgroupPath, Layout};
use slipway_sys::exec::{Begun, ExecError, ExecPlan, Process};
use slipway_sys::process::{self, Child, Exited, Program};
use std::ffi::OsStr;
use std::fs;
use std::io::Read;
use std::io::Write as _;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Once;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// Whether we may do what these tests do; says so loudly when not.
pub fn root() -> bool {
    static SUBREAPER: Once = Once::new();
    let root = rustix::process::geteuid().is_root() && Path::new("/bin/busybox").exists();
    if !root {
        let _ = writeln!(
            std::io::stderr(),
            "\n*** SKIPPED: this test needs root and /bin/busybox (busybox-static) ***\n"
        );
    }
    SUBREAPER.call_once(|| process::become_subreaper().unwrap());
    root
}

pub struct Bundle {
    pub dir: tempfile::TempDir,
    pub config: Value,
    pub id: String,
    pub cgroup: Cgroup,
    pub init: Option<Child>,
    reaped: bool,
}

/// The mounts every container of ours gets.
fn mounts() -> Value {
    json!([
        {"destination":"/proc","type":"proc","source":"proc","options":["nosuid","noexec","nodev"]},
        {"destination":"/dev","type":"tmpfs","source":"tmpfs","options":["nosuid","strictatime","mode=755","size=65536k"]},
        {"destination":"/dev/pts","type":"devpts","source":"devpts","options":["nosuid","noexec","newinstance","ptmxmode=0666","mode=0620","gid=5"]},
        {"destination":"/dev/mqueue","type":"mqueue","source":"mqueue","options":["nosuid","noexec","nodev"]},
        {"destination":"/sys","type":"sysfs","source":"sysfs","options":["nosuid","noexec","nodev","ro"]},
        {"destination":"/sys/fs/cgroup","type":"cgroup","source":"cgroup","options":["nosuid","noexec","nodev","relatime","ro"]}
    ])
}

pub const CAPS: [&str; 9] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FSETID",
    "CAP_FOWNER",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_KILL",
];

impl Bundle {
    pub fn new(script: &str) -> Bundle {
        static N: AtomicU32 = AtomicU32::new(0);
        let dir = tempfile::tempdir().unwrap();
        let rootfs = dir.path().join("rootfs");
        for d in ["bin", "etc", "tmp", "proc", "sys", "dev"] {
            fs::create_dir_all(rootfs.join(d)).unwrap();
        }
        let sticky = std::os::unix::fs::PermissionsExt::from_mode(0o1777);
        fs::set_permissions(rootfs.join("tmp"), sticky).unwrap();
        fs::copy("/bin/busybox", rootfs.join("bin/busybox")).unwrap();
        for applet in [
            "sh", "cat", "sleep", "id", "ls", "true", "stty", "readlink", "echo", "kill", "chown", "touch",
        ] {
            std::os::unix::fs::symlink("busybox", rootfs.join("bin").join(applet)).unwrap();
        }
        fs::write(
            rootfs.join("etc/passwd"),
            "root:x:0:0::/root:/bin/sh\nu:x:1000:1000::/home/u:/bin/sh\n",
        )
        .unwrap();
        let id = format!(
            "slipway-test-{}-c{}",
            std::process::id(),
            N.fetch_add(1, Ordering::Relaxed)
        );
        let path = CgroupPath::parse(&format!("/{id}")).unwrap();
        let cgroup = Cgroup::create(&Layout::detect().unwrap(), &path).unwrap();
        let caps = json!(CAPS);
        let config = json!({
            "ociVersion": "1.2.0",
            "root": {"path": "rootfs", "readonly": false},
            "hostname": "c",
            "process": {
                "args": ["/bin/sh", "-c", script],
                "cwd": "/",
                "env": ["PATH=/bin", "A=1"],
                "user": {"uid": 0, "gid": 0},
                "noNewPrivileges": false,
                "capabilities": {"bounding": caps, "effective": caps, "permitted": caps}
            },
            "mounts": mounts(),
            "linux": {
                "cgroupsPath": format!("/{id}"),
                "namespaces": [{"type":"pid"},{"type":"mount"},{"type":"ipc"},{"type":"uts"},{"type":"network"}],
                "maskedPaths": ["/proc/kcore", "/proc/keys", "/sys/firmware"],
                "readonlyPaths": ["/proc/sys", "/proc/bus"],
                "resources": {"devices":[{"allow":false,"access":"rwm"}], "hugepageLimits":[{"pageSize":"2MB","limit":0}]}
            }
        });
        Bundle {
            dir,
            config,
            id,
            cgroup,
            init: None,
            reaped: false,
        }
    }

    pub fn rootfs(&self) -> PathBuf {
        self.dir.path().join("rootfs")
    }

    pub fn out(&self) -> String {
        fs::read_to_string(self.dir.path().join("out")).unwrap_or_default()
    }

    /// Runs the worker; its report, and the terminal it may bring.
    pub fn create(&mut self) -> Result<Option<OwnedFd>, Value> {
        let (report, terminal, socket) = self.run_worker();
        drop(socket);
        match report["pid"].as_u64() {
            Some(pid) => {
                let pid = u32::try_from(pid).unwrap();
                self.init = Some(Child {
                    pid,
                    pidfd: process::pidfd_open(pid).unwrap(),
                });
                Ok(terminal)
            }
            None => Err(report),
        }
    }

    /// The report, the terminal, and the socket, which init keeps until it runs its program.
    pub fn run_worker(&mut self) -> (Value, Option<OwnedFd>, OwnedFd) {
        let bundle = self.dir.path();
        fs::write(bundle.join("config.json"), self.config.to_string()).unwrap();
        let state = bundle.join("state");
        fs::create_dir_all(&state).unwrap();
        let out = fs::File::create(bundle.join("out")).unwrap();
        let (ours, theirs) = socketpair(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC,
            None,
        )
        .unwrap();
        let join = self.cgroup.join().unwrap();
        let worker = worker();
        let args: [&OsStr; 8] = [
            worker.as_ref(),
            "create".as_ref(),
            "--bundle".as_ref(),
            bundle.as_ref(),
            "--id".as_ref(),
            self.id.as_ref(),
            "--state".as_ref(),
            state.as_ref(),
        ];
        let file = slipway_sys::mount::program(Path::new(&worker)).unwrap();
        let program = Program {
            path: Path::new(&worker),
            file: Some(file.as_fd()),
            args: &args,
            env: &[],
            fds: &[(out.as_fd(), 1), (out.as_fd(), 2), (theirs.as_fd(), 3)],
            new_session: true,
            die_with_parent: false,
            cgroup: Some(&join),
        };
        let worker = process::spawn(&program).unwrap();
        drop(theirs);
        let (mut text, mut fds) = (Vec::new(), Vec::new());
        while !text.contains(&b'\n') {
            let mut some = [0u8; 4096];
            let n = slipway_sys::fd::recv_fds(&ours, &mut some, &mut fds).unwrap();
            if n == 0 {
                break;
            }
            text.extend_from_slice(&some[..n]);
        }
        let exited = process::wait(worker.pid).unwrap();
        let report = serde_json::from_slice(&text).unwrap_or_else(|e| {
            panic!(
                "{e}: {:?}, worker {exited:?}, {}",
                String::from_utf8_lossy(&text),
                self.out()
            )
        });
        (report, fds.pop(), ours)
    }

    pub fn start(&self) {
        use std::io::Write;
        let path = self.dir.path().join("state").join(&self.id).join("notify.sock");
        std::os::unix::net::UnixStream::connect(path)
            .unwrap()
            .write_all(b"x")
            .unwrap();
    }

    pub fn wait(&mut self) -> Exited {
        let init = self.init.as_ref().unwrap();
        assert!(
            process::wait_ended(init.pidfd.as_fd(), Duration::from_secs(20)).unwrap(),
            "it does not end"
        );
        self.reaped = true;
        process::wait(init.pid).unwrap()
    }

    /// Creates, starts, waits; what it printed.
    pub fn run(&mut self) -> (u32, String) {
        if let Err(report) = self.create() {
            panic!("{report}");
        }
        self.start();
        let code = self.wait().status.exit_code();
        (code, self.out())
    }

    /// Creates and starts; returns once the script has said `ready`.
    pub fn run_until_ready(&mut self) {
        if let Err(report) = self.create() {
            panic!("{report}");
        }
        self.start();
        for _ in 0..1000 {
            if self.out().contains("ready") {
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        panic!("not ready: {}", self.out());
    }

    pub fn process(&self) -> Process {
        serde_json::from_value(self.config["process"].clone()).unwrap()
    }

    /// Runs a script in the container; stdout and stderr come back.
    pub fn exec(&self, process: &Process) -> Result<(u32, String), ExecError> {
        let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        let spawned = self.spawn(process, [None, Some(write.as_fd()), Some(write.as_fd())])?;
        drop(write);
        let mut text = String::new();
        fs::File::from(read).read_to_string(&mut text).unwrap();
        let exited = process::wait(spawned.pid).unwrap();
        Ok((exited.status.exit_code(), text))
    }

    pub fn spawn(
        &self,
        process: &Process,
        stdio: [Option<std::os::fd::BorrowedFd<'_>>; 3],
    ) -> Result<Spawned, ExecError> {
        let init = self.init.as_ref().unwrap();
        let bpf = fs::read(self.dir.path().join("seccomp.bpf")).ok();
        spawn(&ExecPlan {
            init_pid: init.pid,
            pidfd: init.pidfd.as_fd(),
            process,
            seccomp_bpf: bpf.as_deref(),
            cgroup: Some(&self.cgroup),
            stdio,
        })
    }

    pub fn script(&self, script: &str) -> Process {
        let mut p = self.process();
        p.args = ["/bin/sh", "-c", script].map(str::to_string).to_vec();
        p
    }
}

/// A process that runs (its exec has happened), our child: the caller reaps it.
#[derive(Debug)]
pub struct Spawned {
    pub pid: u32,
    pub pidfd: OwnedFd,
    pub pty_master: Option<OwnedFd>,
}

/// Runs a process in a container and answers when it runs its program.
pub fn spawn(plan: &ExecPlan<'_>) -> Result<Spawned, ExecError> {
    let mut starting = slipway_sys::exec::begin(plan)?;
    let until = Instant::now() + slipway_sys::exec::PATIENCE;
    let result = loop {
        let left = until.saturating_duration_since(Instant::now());
        assert!(
            process::wait_ended(starting.fd(), left).unwrap(),
            "not heard of in time"
        );
        if let Some(result) = starting.hear() {
            break result;
        }
    };
    // Nobody else reaps them.
    process::wait(starting.ahead().pid).unwrap();
    match result {
        Ok(Begun { pid, pty_master }) => Ok(Spawned {
            pid,
            pidfd: process::pidfd_open(pid).unwrap(),
            pty_master,
        }),
        Err(error) => {
            if let Some(pid) = starting.pid() {
                let _ = process::wait(pid);
            }
            Err(error)
        }
    }
}

impl Drop for Bundle {
    fn drop(&mut self) {
        self.cgroup.kill().unwrap();
        if let Some(init) = self.init.take()
            && !self.reaped
        {
            // Everything of its PID namespace is gone when init is; those are our children too.
            while !process::wait_ended(init.pidfd.as_fd(), Duration::from_millis(200)).unwrap() {}
            let _ = process::wait(init.pid);
        }
        self.cgroup.wait_empty(Duration::from_secs(5)).unwrap();
        self.cgroup.remove(Duration::from_secs(5)).unwrap();
        assert!(!self.cgroup.exists(), "the cgroup is left");
        let left = slipway_sys::mount::mounts_under(self.dir.path()).unwrap();
        for m in &left {
            slipway_sys::mount::unmount(m, true).unwrap();
        }
        assert!(left.is_empty(), "{left:?} are left mounted");
    }
}

/// The worker under test: a static release build when the environment names one.
pub fn worker() -> String {
    std::env::var("SLIPWAY_TEST_WORKER").unwrap_or_else(|_| env!("CARGO_BIN_EXE_slipway-runc").to_string())
}

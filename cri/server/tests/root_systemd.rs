//! The CRI socket in systemd's store of descriptors, with systemd played: what it is told, what it holds, what the next one is given.

#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a panic is how a test says no")]

use std::io::Write as _;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use slipway_cri_api::v1;
use slipway_cri_api::v1::runtime_service_client::RuntimeServiceClient;
use tonic::transport::{Endpoint, Uri};

const LIMIT: Duration = Duration::from_secs(30);

/// As systemd is with FileDescriptorStoreMax=1.
struct Systemd {
    dir: tempfile::TempDir,
    told: UnixDatagram,
    store: Option<OwnedFd>,
    /// Descriptors for which there was no room.
    refused: usize,
}

/// A slipwayd that serves; killed where the test does not end it.
struct Slipwayd(Child);

impl Drop for Slipwayd {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Systemd {
    /// `None`, told loudly, where slipwayd cannot run.
    fn new() -> Option<Systemd> {
        if !rustix::process::geteuid().is_root() {
            let _ = writeln!(std::io::stderr(), "\n*** SKIPPED: this test needs root ***\n");
            return None;
        }
        let dir = tempfile::Builder::new()
            .prefix("slipway-test-")
            .tempdir_in("/var/tmp")
            .unwrap();
        let told = UnixDatagram::bind(dir.path().join("notify")).unwrap();
        told.set_read_timeout(Some(LIMIT)).unwrap();
        std::os::unix::fs::symlink(dir.path(), dir.path().join("link")).unwrap();
        Some(Systemd {
            dir,
            told,
            store: None,
            refused: 0,
        })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Does what it is told until that is `last`.
    fn until(&mut self, last: &str) {
        loop {
            let (mut bytes, mut fds) = ([0; 4096], Vec::new());
            let n = slipway_sys::fd::recv_fds(&self.told, &mut bytes, &mut fds)
                .unwrap_or_else(|error| panic!("not told {last:?}: {error}\n{}", self.log()));
            match std::str::from_utf8(&bytes[..n]).unwrap() {
                "FDSTORE=1\nFDNAME=cri" if self.store.is_none() => self.store = fds.pop(),
                "FDSTORE=1\nFDNAME=cri" => self.refused += 1,
                "FDSTOREREMOVE=1\nFDNAME=cri" => self.store = None,
                "BARRIER=1" => assert_eq!(fds.len(), 1),
                state if state == last => return,
                other => panic!("{other:?} in place of {last:?}"),
            }
        }
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    /// Starts slipwayd as a unit with this socket, gives it what is in the store, named so, and waits until it serves. Another
    /// descriptor comes before that where `names` has two.
    fn start(&mut self, socket: &Path, names: &str) -> Slipwayd {
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(self.path("log"))
            .unwrap();
        let mut command = Command::new("sh");
        let given = match names.split(':').count() {
            2 => "exec 3</dev/null 4<&0",
            _ => "exec 3<&0",
        };
        let script = format!("{given} 0</dev/null; LISTEN_PID=$$ exec \"$@\"");
        command.args(["-c", &script, "sh", env!("CARGO_BIN_EXE_slipwayd")]);
        for (flag, name) in [("--config", "config"), ("--root", "root"), ("--state", "state")] {
            command.arg(flag).arg(self.path(name));
        }
        command.arg("--socket").arg(socket);
        command
            .env("NOTIFY_SOCKET", self.path("notify"))
            .env("FDSTORE", "1");
        match &self.store {
            Some(kept) => {
                let count = names.split(':').count().to_string();
                command.env("LISTEN_FDS", count).env("LISTEN_FDNAMES", names);
                command.stdin(kept.as_fd().try_clone_to_owned().unwrap());
            }
            None => {
                command.stdin(Stdio::null());
            }
        }
        // Nothing is run here.
        let config =
            "[runtime]\nshim = \"/bin/true\"\nworker = \"/bin/true\"\n[network]\nconf_dir = \"/nowhere\"\n";
        std::fs::write(self.path("config"), config).unwrap();
        let child = command
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let child = Slipwayd(child);
        self.until("READY=1");
        child
    }

    fn stop(&mut self, mut child: Slipwayd) {
        let pid = rustix::process::Pid::from_child(&child.0);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        self.until("STOPPING=1");
        assert!(child.0.wait().unwrap().success(), "{}", self.log());
    }
}

/// Whether slipwayd answers at that socket.
async fn served(socket: &Path) {
    let socket = socket.to_owned();
    let connector = tower::service_fn(move |_: Uri| {
        let socket = socket.clone();
        async move { tokio::net::UnixStream::connect(socket).await.map(TokioIo::new) }
    });
    let endpoint = Endpoint::from_static("http://slipwayd");
    let asked = async {
        let channel = endpoint.connect_with_connector(connector).await.unwrap();
        let mut client = RuntimeServiceClient::new(channel);
        let version = client.version(v1::VersionRequest::default()).await;
        version.unwrap().into_inner().runtime_name
    };
    assert_eq!(tokio::time::timeout(LIMIT, asked).await.unwrap(), "slipway");
}

/// Stops it, and starts it with that socket: who comes between is not turned away.
async fn restart(systemd: &mut Systemd, child: Slipwayd, socket: &Path, names: &str) -> Slipwayd {
    systemd.stop(child);
    drop(UnixStream::connect(socket).unwrap());
    let next = systemd.start(socket, names);
    served(socket).await;
    assert_eq!(systemd.refused, 0);
    next
}

/// Of each of the two descriptors that it was given, whether it is.
fn close_on_exec(child: &Slipwayd) -> [bool; 2] {
    [3, 4].map(|number| {
        let info = std::fs::read_to_string(format!("/proc/{}/fdinfo/{number}", child.0.id())).unwrap();
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).unwrap();
        let flags = u32::from_str_radix(flags.trim(), 8).unwrap();
        flags & rustix::fs::OFlags::CLOEXEC.bits() != 0
    })
}

#[tokio::test]
async fn root_a_kept_socket_is_found_by_name_and_however_its_path_is_spelled() {
    let Some(mut systemd) = Systemd::new() else { return };
    let socket = systemd.path("state/slipwayd.sock");
    let mut child = systemd.start(&socket, "");
    served(&socket).await;
    for names in ["cri", "cri", "other:cri"] {
        child = restart(&mut systemd, child, &socket, names).await;
    }
    // What it is given gets into no shim, whatever it is.
    assert_eq!(close_on_exec(&child), [true, true], "{}", systemd.log());
    let spelled = systemd.path("link/state/slipwayd.sock");
    child = restart(&mut systemd, child, &spelled, "cri").await;
    systemd.stop(child);
}

#[tokio::test]
async fn root_a_kept_socket_that_is_of_no_use_makes_room_for_the_next() {
    let Some(mut systemd) = Systemd::new() else { return };
    let (first, second) = (
        systemd.path("state/first.sock"),
        systemd.path("state/second.sock"),
    );
    let child = systemd.start(&first, "");
    systemd.stop(child);
    let mut child = systemd.start(&second, "cri");
    served(&second).await;
    UnixStream::connect(&first).expect_err("somebody listens there, and nobody will answer");
    child = restart(&mut systemd, child, &second, "cri").await;
    // Its file is lost, as with the state directory.
    std::fs::remove_file(&second).unwrap();
    systemd.stop(child);
    child = systemd.start(&second, "cri");
    child = restart(&mut systemd, child, &second, "cri").await;
    systemd.stop(child);
}

//! A store and state directory of a test's own, the program under test, and the proof that nothing is left.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// The base image of most tests.
pub const BASE: &str = "test/busybox:1";

/// A corner of the machine.
pub struct Lab {
    dir: tempfile::TempDir,
}

/// What a command said.
#[derive(Debug)]
pub struct Said {
    pub code: i32,
    pub out: String,
    pub err: String,
}

impl Said {
    pub fn ok(self) -> Said {
        assert_eq!(self.code, 0, "--- stdout\n{}\n--- stderr\n{}", self.out, self.err);
        self
    }

    pub fn failed(self) -> Said {
        assert_ne!(self.code, 0, "--- stdout\n{}\n--- stderr\n{}", self.out, self.err);
        self
    }
}

impl From<Output> for Said {
    fn from(output: Output) -> Said {
        use std::os::unix::process::ExitStatusExt;
        Said {
            code: output
                .status
                .code()
                .unwrap_or_else(|| 128 + output.status.signal().unwrap_or(0)),
            out: String::from_utf8_lossy(&output.stdout).into_owned(),
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

impl Lab {
    /// `None` where tests like these cannot run; says so, loudly.
    pub fn bare() -> Option<Lab> {
        let skip = |why: &str| {
            let _ = writeln!(std::io::stderr(), "SKIPPED: {why}");
            None
        };
        if !rustix::process::geteuid().is_root() {
            return skip("builds mount overlays and run containers: only root can");
        }
        let beside = Path::new(env!("CARGO_BIN_EXE_slipway")).with_file_name("containerd-shim-slipway-v1");
        if !beside.exists() {
            return skip("the shim is not built (cargo build -p containerd-shim-slipway-v1 -p slipway-runc)");
        }
        Some(Lab {
            dir: tempfile::tempdir().unwrap(),
        })
    }

    /// With the base image in its store.
    pub fn new() -> Option<Lab> {
        let lab = Lab::bare()?;
        let Some(busybox) = ["/bin/busybox", "/usr/bin/busybox"]
            .into_iter()
            .find(|p| Path::new(p).exists())
        else {
            let _ = writeln!(std::io::stderr(), "SKIPPED: busybox-static is not installed");
            return None;
        };
        let root = lab.path("base/rootfs");
        std::fs::create_dir_all(root.join("bin")).unwrap();
        std::fs::copy(busybox, root.join("bin/busybox")).unwrap();
        let list = Command::new(busybox).arg("--list").output().unwrap().stdout;
        for applet in String::from_utf8_lossy(&list).lines().filter(|a| *a != "busybox") {
            std::os::unix::fs::symlink("busybox", root.join("bin").join(applet)).unwrap();
        }
        lab.write(
            "base/rootfs/etc/passwd",
            "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1001:app:/home/app:/bin/sh\n",
        );
        lab.write("base/rootfs/etc/group", "root:x:0:\napp:x:1001:\n");
        lab.write("base/rootfs/root/.keep", "");
        lab.write("base/rootfs/home/app/.keep", "");
        lab.write(
            "base/Dockerfile",
            "FROM scratch\nCOPY rootfs/ /\nENV PATH=/bin\nCMD [\"sh\"]\n",
        );
        let dir = lab.path("base").display().to_string();
        lab.run(&["build", "-q", "-t", BASE, &dir]).ok();
        Some(lab)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn write(&self, path: &str, text: &str) -> PathBuf {
        let path = self.path(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, text).unwrap();
        path
    }

    /// A context with a Dockerfile; its directory.
    pub fn context(&self, name: &str, dockerfile: &str) -> String {
        self.write(&format!("{name}/Dockerfile"), dockerfile);
        self.path(name).display().to_string()
    }

    pub fn command(&self, args: &[&str]) -> Command {
        self.command_at(&self.path("root"), args)
    }

    /// On another store.
    pub fn command_at(&self, root: &Path, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_slipway"));
        command
            .args(&args[..1])
            .arg("--root")
            .arg(root)
            .arg("--state")
            .arg(self.path("state"));
        command
            .arg("--cni-conf-dir")
            .arg(self.path("net"))
            .arg("--cni-bin-dir")
            .arg("/usr/lib/cni")
            .arg("--cdi-spec-dir")
            .arg(self.path("cdi"))
            .args(&args[1..]);
        command.env_remove("SOURCE_DATE_EPOCH").stdin(Stdio::null());
        command
    }

    pub fn run(&self, args: &[&str]) -> Said {
        self.command(args).output().unwrap().into()
    }

    /// `slipway build --progress plain ARGS`.
    pub fn build(&self, args: &[&str]) -> Said {
        let mut all = vec!["build", "--progress", "plain"];
        all.extend(args);
        self.run(&all)
    }

    pub fn fed(&self, args: &[&str], input: &[u8]) -> Said {
        let mut child = self
            .command(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(input).unwrap();
        child.wait_with_output().unwrap().into()
    }

    /// Starts a build whose output goes into a file.
    pub fn start(&self, args: &[&str], out: &str) -> Child {
        let mut all = vec!["build", "--progress", "plain"];
        all.extend(args);
        self.command(&all)
            .stdout(std::fs::File::create(self.path(out)).unwrap())
            .stderr(Stdio::null())
            .spawn()
            .unwrap()
    }

    /// Waits until a line of a started build's output ends with `text`.
    pub fn wait_for(&self, out: &str, text: &str) {
        let began = Instant::now();
        loop {
            let said = std::fs::read_to_string(self.path(out)).unwrap_or_default();
            // The step's own line names the command: its output comes after a time.
            if said.lines().any(|l| l.ends_with(text) && !l.contains("RUN")) {
                return;
            }
            assert!(
                began.elapsed() < Duration::from_secs(30),
                "{text:?} did not appear:\n{said}"
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    pub fn inspect(&self, name: &str) -> serde_json::Value {
        serde_json::from_str(&self.run(&["inspect", "--format", "json", name]).ok().out).unwrap()
    }

    /// What a script prints in the image.
    pub fn look(&self, name: &str, script: &str) -> String {
        let dir = self.context("look", &format!("FROM {name}\nRUN <<EOF\n{script}\nEOF\n"));
        let said = self.build(&["--no-cache", &dir]).ok();
        said.out
            .lines()
            .filter_map(|l| l.strip_prefix("[2/2] "))
            .filter_map(|l| l.trim_start().split_once(' '))
            .filter(|(time, _)| time.parse::<f64>().is_ok())
            .map(|(_, text)| format!("{text}\n"))
            .collect()
    }

    /// From here on builds are networked by CNI: point to point, addresses leased under the lab. `false`: no plugins.
    pub fn network(&self, third: u8) -> bool {
        if !Path::new("/usr/lib/cni/ptp").exists() {
            let _ = writeln!(
                std::io::stderr(),
                "SKIPPED: the standard CNI plugins are not installed (containernetworking-plugins)"
            );
            return false;
        }
        let list = serde_json::json!({
            "cniVersion": "1.0.0", "name": "slipway-engine-test",
            "plugins": [{ "type": "ptp", "ipMasq": false, "ipam": {
                "type": "host-local", "dataDir": self.path("ipam"),
                "ranges": [[{ "subnet": format!("10.211.{third}.0/24") }]] } }]
        });
        self.write("net/10-test.conflist", &list.to_string());
        true
    }

    /// Addresses that are leased now.
    pub fn leases(&self) -> usize {
        let dir = std::fs::read_dir(self.path("ipam/slipway-engine-test"));
        let names = dir
            .into_iter()
            .flatten()
            .flatten()
            .map(|e| e.file_name().to_string_lossy().into_owned());
        names.filter(|n| n.parse::<std::net::IpAddr>().is_ok()).count()
    }

    /// Everything of this lab that is on the machine now.
    pub fn leftovers(&self) -> Vec<String> {
        let here = self.dir.path().display().to_string();
        let mut found: Vec<String> = std::fs::read_to_string("/proc/self/mountinfo")
            .unwrap()
            .lines()
            .filter(|l| l.contains(&here))
            .map(|l| format!("mount {l}"))
            .collect();
        for entry in std::fs::read_dir("/proc").unwrap().flatten() {
            let own = entry.file_name().to_string_lossy() == std::process::id().to_string();
            let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line).replace('\0', " ");
            if !own && line.contains(&here) {
                found.push(format!("process {}: {line}", entry.file_name().display()));
            }
        }
        for entry in std::fs::read_dir(self.path("state/builds"))
            .into_iter()
            .flatten()
            .flatten()
        {
            found.push(format!("directory {}", entry.path().display()));
        }
        found
    }

    /// Waits a moment for what ends by itself; then nothing may be there.
    pub fn clean(&self) {
        let began = Instant::now();
        loop {
            let found = self.leftovers();
            if found.is_empty() {
                return;
            }
            assert!(
                began.elapsed() < Duration::from_secs(5),
                "left behind:\n{}",
                found.join("\n")
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.clean();
        }
    }
}

/// Sends a signal to a child.
pub fn signal(child: &Child, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap();
    rustix::process::kill_process(pid, signal).unwrap();
}

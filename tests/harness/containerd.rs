//! The real containerd, beside us.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::{Lab, cmd, lab};

/// A containerd of this test's own, with our programs first on its PATH.
#[derive(Debug)]
pub struct Containerd {
    child: Child,
    socket: String,
    path: String,
}

impl Containerd {
    /// Starts it, on a root and a socket below the lab.
    ///
    /// # Errors
    /// It is not built, or does not answer within 20 s: its log is in the error.
    pub fn start(lab: &Lab) -> Result<Containerd> {
        let socket = lab.join("ctrd/run/containerd.sock").display().to_string();
        let config = lab.write(
            "ctrd/config.toml",
            format!(
                "version = 3\nroot = '{}'\nstate = '{}'\ndisabled_plugins = ['io.containerd.cri.v1.runtime', 'io.containerd.cri.v1.images', 'io.containerd.grpc.v1.cri', 'io.containerd.nri.v1.nri', 'io.containerd.internal.v1.opt', 'io.containerd.snapshotter.v1.devmapper']\n[grpc]\n  address = '{socket}'\n[ttrpc]\n  address = '{socket}.ttrpc'\n",
                lab.join("ctrd/root").display(),
                lab.join("ctrd/run").display(),
            ),
        )?;
        let bin = lab::bin("");
        let path = format!(
            "{}:{}:/usr/sbin:/usr/bin:/sbin:/bin",
            bin.display(),
            lab::cache().join("tools/bin").display()
        );
        let log = std::fs::File::create(lab.join("ctrd/log"))?;
        let child = Command::new(lab::tool("containerd"))
            .arg("--config")
            .arg(config)
            .env("PATH", &path)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("starting containerd (tests/setup/go-tools.sh containerd builds it)")?;
        let c = Containerd { child, socket, path };
        let began = Instant::now();
        while c.ctr(&["version"])?.code != 0 {
            if began.elapsed() > Duration::from_secs(20) {
                bail!(
                    "containerd does not answer:\n{}",
                    std::fs::read_to_string(lab.join("ctrd/log"))?
                );
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(c)
    }

    /// `ctr ARGS` on it.
    ///
    /// # Errors
    /// It could not be started, or ran for more than a minute.
    pub fn ctr(&self, args: &[&str]) -> Result<cmd::Output> {
        cmd::run(&mut self.command(args), Duration::from_secs(60))
    }

    /// The same where the CDI files below `dir` are the machine's: `ctr` looks for them in one place only.
    ///
    /// # Errors
    /// As [`Containerd::ctr`].
    pub fn ctr_with_cdi(&self, dir: &Path, args: &[&str]) -> Result<cmd::Output> {
        let command = self.command(args);
        let script =
            "mount -t tmpfs none /run && mkdir /run/cdi && cp \"$1\"/* /run/cdi/ && shift && exec \"$@\"";
        let mut all = cmd::command("unshare", ["--mount", "sh", "-c", script, "sh"]);
        all.arg(dir).arg(command.get_program()).args(command.get_args());
        cmd::run(all.env("PATH", &self.path), Duration::from_secs(60))
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut all = vec!["--address", self.socket.as_str(), "--namespace", "test"];
        all.extend(args);
        let mut c = cmd::command(lab::tool("ctr"), all);
        c.env("PATH", &self.path);
        c
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

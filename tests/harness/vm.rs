//! A guest under QEMU's software emulation: unified cgroups, systemd, AppArmor and every capability, as real nodes have them.
//!
//! The guest's image, its kernel and the machine as it is after a boot come from tests/setup/vm-image.sh. A guest goes on from that
//! machine, or boots from its disk when its power was cut; a second disk has what is to be done (tests/vm): its `run.sh` speaks to
//! us over the console. Time in the guest is counted in its own instructions (`-icount`), so limits in there hold on a busy machine
//! too; ours are for a guest that says nothing any more.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};

use crate::cmd;
use crate::lab::{self, Lab};

/// A guest says that it lives each three seconds of its own time: this long without a word, on however busy a machine, and it is dead.
const SILENCE: Duration = Duration::from_secs(400);

/// A running guest; killed when dropped, which is a power cut.
pub struct Guest {
    child: Child,
    lines: Receiver<String>,
    heard: Vec<String>,
}

/// What the suite's disk is made of, below `lab`.
///
/// # Errors
/// A program or an image is missing.
pub fn gather(lab: &Lab) -> Result<PathBuf> {
    let dir = lab.join("suite");
    let cache = lab::cache();
    std::fs::create_dir_all(dir.join("bin"))?;
    std::fs::create_dir_all(dir.join("empty"))?;
    let repo = lab::repo();
    let programs = lab::bin("slipwayd").with_file_name("");
    cmd::run(
        Command::new(repo.join("manifests/node/install.sh"))
            .arg(programs)
            .args([
                dir.join("install").display().to_string().as_str(),
                "/usr/local",
                "/etc",
                "/usr/local/lib/systemd/system",
            ]),
        Duration::from_secs(60),
    )?
    .ok()
    .context("installing into the guest's disk")?;
    for tool in ["crictl", "critest", "kubelet"] {
        std::fs::copy(lab::tool(tool), dir.join("bin").join(tool))
            .with_context(|| format!("copying {tool}"))?;
    }
    let copy =
        |from: &Path, to: &str| cmd::sh(&format!("cp -rL {} {}", from.display(), dir.join(to).display()));
    copy(&lab::cni_bin(), "cni")?;
    copy(&cache.join("lab-images"), "images")?;
    copy(&repo.join("tests/vm/."), ".")?;
    copy(&repo.join("manifests/node"), "node")?;
    copy(&repo.join("manifests/images/node/Dockerfile"), "node.Dockerfile")?;
    std::fs::write(dir.join("set-up.json"), set_up_pod(&repo.join("manifests/base"))?)?;
    Ok(dir)
}

/// The pod of the DaemonSet slipway-node-setup as one that kubelet reads from a file, called `NAME`.
fn set_up_pod(base: &Path) -> Result<String> {
    // kubectl writes JSON of what it knows without a server.
    let json = cmd::sh(&format!(
        "'{0}' kustomize '{1}' | '{0}' label --local -f - written=out -o json",
        lab::tool("kubectl").display(),
        base.display()
    ))?;
    let all = serde_json::Deserializer::from_str(&json).into_iter::<serde_json::Value>();
    let daemon_set = all
        .flatten()
        .find(|o| o["kind"] == "DaemonSet" && o["metadata"]["name"] == "slipway-node-setup")
        .context("no DaemonSet slipway-node-setup")?;
    let pod = serde_json::json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": { "name": "NAME", "namespace": "default" },
        "spec": daemon_set["spec"]["template"]["spec"],
    });
    Ok(pod.to_string())
}

/// A disk with what [`gather`] gathered; guests that go on run `phase`.
///
/// # Errors
/// mkfs.ext4 fails.
pub fn suite_disk(lab: &Lab, dir: &Path, phase: &str) -> Result<PathBuf> {
    std::fs::write(dir.join("phase"), phase)?;
    // For a machine that has been standing still.
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    std::fs::write(dir.join("now"), now.to_string())?;
    let disk = lab.join("suite.ext4");
    let make = format!(
        "truncate -s {} {disk} && mkfs.ext4 -q -O ^has_journal -d {} {disk}",
        kept("suite-size")?,
        dir.display(),
        disk = disk.display()
    );
    cmd::run(&mut cmd::command("sh", ["-c", &make]), Duration::from_secs(300))?
        .ok()
        .context("making the suite's disk")?;
    Ok(disk)
}

/// What the set-up left in a file of the cache.
fn kept(file: &str) -> Result<String> {
    let path = lab::cache().join("vm").join(file);
    let text = std::fs::read_to_string(&path)
        .with_context(|| format!("reading {} (tests/setup/vm-image.sh makes it)", path.display()))?;
    Ok(text.trim().to_owned())
}

/// A disk that keeps what a guest writes, over the cached image.
///
/// # Errors
/// The image is not there.
pub fn overlay(lab: &Lab) -> Result<PathBuf> {
    let base = lab::cache().join("vm/root.ext4");
    if !base.exists() {
        bail!(
            "{} is not there (tests/setup/vm-image.sh makes it)",
            base.display()
        );
    }
    let disk = lab.join("disk.qcow2");
    cmd::sh(&format!(
        "qemu-img create -q -f qcow2 -F raw -b {} {}",
        base.display(),
        disk.display()
    ))?;
    Ok(disk)
}

impl Guest {
    /// Goes on from the machine that the set-up booted, with `disk` over its own and the suite's disk in place of a blank one; what
    /// it says is told under `name`.
    ///
    /// # Errors
    /// QEMU or what the set-up makes is missing.
    pub fn go_on(name: &str, disk: &Path, suite: &Path) -> Result<Guest> {
        let state = lab::cache().join("vm/kept");
        let from = format!("exec:cat {}", state.display());
        Guest::start(name, disk, suite, &kept("kernel")?, &["-incoming", &from])
    }

    /// Boots a guest from `disk` with the suite's disk beside it; it runs `phase`.
    ///
    /// # Errors
    /// QEMU or what the set-up makes is missing.
    pub fn boot(name: &str, disk: &Path, suite: &Path, phase: &str) -> Result<Guest> {
        let kernel = format!("{} suite.phase={phase}", kept("kernel")?);
        Guest::start(name, disk, suite, &kernel, &[])
    }

    fn start(name: &str, disk: &Path, suite: &Path, kernel: &str, more: &[&str]) -> Result<Guest> {
        let vm = lab::cache().join("vm");
        // It ends with us, however we end.
        let mut child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "--", "qemu-system-x86_64"])
            .args(kept("machine")?.split(' '))
            .args("-monitor none -serial stdio".split(' '))
            .arg("-kernel")
            .arg(vm.join("vmlinuz"))
            .arg("-initrd")
            .arg(vm.join("initrd.img"))
            .arg("-drive")
            .arg(format!(
                "file={},format=qcow2,if=virtio,cache=unsafe",
                disk.display()
            ))
            .arg("-drive")
            .arg(format!(
                "file={},format=raw,if=virtio,cache=unsafe,readonly=on",
                suite.display()
            ))
            .arg("-append")
            .arg(kernel)
            .args(more)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .context("starting qemu-system-x86_64 (tests/setup/vm-image.sh installs it)")?;
        let name = name.to_owned();
        let out = child.stdout.take().context("piped")?;
        let (tell, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(out).split(b'\n') {
                let Ok(line) = line else { break };
                let text = String::from_utf8_lossy(&line).trim_end().to_owned();
                if let Some((_, said)) = text.split_once("SUITE ") {
                    if !said.starts_with("alive") {
                        crate::tell(&format!("vm {name}: {said}"));
                    }
                } else if text.starts_with("  | ") || text.starts_with("  > ") {
                    // What a failed test printed, and slipwayd's last words.
                    crate::tell(&text);
                }
                if tell.send(text).is_err() {
                    break;
                }
            }
        });
        Ok(Guest {
            child,
            lines,
            heard: Vec::new(),
        })
    }

    /// Waits for a line of the console that says `what`; all lines until then, that one last.
    ///
    /// # Errors
    /// The guest ended, or says nothing any more: the last things that it said.
    pub fn wait(&mut self, what: &str) -> Result<Vec<String>> {
        self.wait_for(&[what])
    }

    /// As [`Guest::wait`], for the first of several.
    ///
    /// # Errors
    /// Likewise.
    pub fn wait_for(&mut self, what: &[&str]) -> Result<Vec<String>> {
        let from = self.heard.len();
        loop {
            let last = |heard: &[String]| heard[heard.len().saturating_sub(60)..].join("\n");
            match self.lines.recv_timeout(SILENCE) {
                Ok(line) if line.contains("SUITE alive") => {}
                Ok(line) => {
                    let found = what.iter().any(|what| line.contains(what));
                    self.heard.push(line);
                    if found {
                        return Ok(self.heard[from..].to_vec());
                    }
                }
                Err(RecvTimeoutError::Timeout) => {
                    bail!(
                        "the guest was silent for {SILENCE:?} before {what:?}:\n{}",
                        last(&self.heard)
                    )
                }
                Err(RecvTimeoutError::Disconnected) => {
                    bail!("the guest ended before {what:?}:\n{}", last(&self.heard))
                }
            }
        }
    }

    /// Waits until the guest powers itself off.
    ///
    /// # Errors
    /// It does not.
    pub fn wait_end(mut self) -> Result<()> {
        loop {
            match self.lines.recv_timeout(SILENCE) {
                Ok(line) => self.heard.push(line),
                Err(RecvTimeoutError::Timeout) => {
                    bail!("the guest does not power off: {:?}", self.heard.last())
                }
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        let status = self.child.wait()?;
        if !status.success() {
            bail!("QEMU: {status}");
        }
        Ok(())
    }

    /// Cuts the power.
    ///
    /// # Errors
    /// QEMU could not be killed.
    pub fn cut(mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

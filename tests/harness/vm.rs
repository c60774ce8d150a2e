//! A guest under QEMU's software emulation: unified cgroups, systemd, AppArmor and every capability, as real nodes have them.
//!
//! The guest's image and kernel come from tests/setup/vm-image.sh; a boot gets an overlay of it, and a second disk with what is to
//! be done (tests/vm): its `run.sh` speaks to us over the console.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::cmd;
use crate::lab::{self, Lab};

/// A running guest; killed when dropped, which is a power cut.
pub struct Guest {
    child: Child,
    lines: Receiver<String>,
    heard: Vec<String>,
}

/// What the guest's disk is made of, below `lab`: done once, then [`suite_disk`] for each phase.
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
    for tool in ["crictl", "critest"] {
        std::fs::copy(lab::tool(tool), dir.join("bin").join(tool))
            .with_context(|| format!("copying {tool}"))?;
    }
    let copy =
        |from: &Path, to: &str| cmd::sh(&format!("cp -rL {} {}", from.display(), dir.join(to).display()));
    copy(&lab::cni_bin(), "cni")?;
    copy(&cache.join("lab-images"), "images")?;
    copy(&repo.join("tests/vm/."), ".")?;
    Ok(dir)
}

/// A disk with what [`gather`] gathered that runs `phase`.
///
/// # Errors
/// mkfs.ext4 fails.
pub fn suite_disk(lab: &Lab, dir: &Path, phase: &str) -> Result<PathBuf> {
    std::fs::write(dir.join("phase"), phase)?;
    let disk = lab.join(format!("{phase}.ext4"));
    let _ = std::fs::remove_file(&disk);
    cmd::sh(&format!(
        "mkfs.ext4 -q -O ^has_journal -d {} {} 700M",
        dir.display(),
        disk.display()
    ))?;
    Ok(disk)
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
    /// Boots a guest from `disk` with the suite's disk beside it.
    ///
    /// # Errors
    /// QEMU is not installed.
    pub fn boot(disk: &Path, suite: &Path) -> Result<Guest> {
        let vm = lab::cache().join("vm");
        let mut child = Command::new("qemu-system-x86_64")
            .args("-M q35 -accel tcg,thread=multi -cpu max -m 2048 -smp 2 -display none -monitor none -serial stdio -no-reboot -nic none".split(' '))
            .arg("-kernel")
            .arg(vm.join("vmlinuz"))
            .arg("-initrd")
            .arg(vm.join("initrd.img"))
            .arg("-drive")
            .arg(format!("file={},format=qcow2,if=virtio", disk.display()))
            .arg("-drive")
            .arg(format!("file={},format=raw,if=virtio", suite.display()))
            .arg("-append")
            // Emulated time does not pass evenly on a busy machine: the kernel's test of its timer fails there, and the boot hangs.
            .arg("console=ttyS0 root=/dev/vda rw quiet systemd.show_status=0 apparmor=1 security=apparmor no_timer_check")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .context("starting qemu-system-x86_64 (tests/setup/vm-image.sh installs it)")?;
        let out = child.stdout.take().context("piped")?;
        let (tell, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(out).split(b'\n') {
                let Ok(line) = line else { break };
                let text = String::from_utf8_lossy(&line).trim_end().to_owned();
                if let Some((_, said)) = text.split_once("SUITE ") {
                    crate::tell(&format!("vm: {said}"));
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
    /// The guest ended, or did not say so within `limit`: everything it said.
    pub fn wait(&mut self, what: &str, limit: Duration) -> Result<Vec<String>> {
        let (began, from) = (Instant::now(), self.heard.len());
        loop {
            let left = limit.saturating_sub(began.elapsed());
            match self.lines.recv_timeout(left) {
                Ok(line) => {
                    let found = line.contains(what);
                    self.heard.push(line);
                    if found {
                        return Ok(self.heard[from..].to_vec());
                    }
                }
                Err(RecvTimeoutError::Timeout) => {
                    bail!("no {what:?} within {limit:?}:\n{}", self.heard.join("\n"))
                }
                Err(RecvTimeoutError::Disconnected) => {
                    bail!("the guest ended before {what:?}:\n{}", self.heard.join("\n"))
                }
            }
        }
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

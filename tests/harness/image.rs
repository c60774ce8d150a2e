//! Small images, made by our own builder in the store under test.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::cmd::{self, Output};
use crate::lab::{self, Lab};
use crate::registry::Registry;

/// The name of the image [`busybox`] makes.
pub const BUSYBOX: &str = "slipway.test/busybox:1";

/// `slipway ARGS` on the store at `root`.
pub fn slipway(root: &Path, state: &Path, args: &[&str]) -> std::process::Command {
    let mut c = cmd::command(lab::bin("slipway"), args.iter().take(1));
    c.arg("--root")
        .arg(root)
        .arg("--state")
        .arg(state)
        .args(args.iter().skip(1));
    c
}

/// Runs `slipway ARGS` on the lab's default store; its output.
///
/// # Errors
/// It could not be started, or ran for more than five minutes.
pub fn run_slipway(lab: &Lab, args: &[&str]) -> Result<Output> {
    cmd::run(
        &mut slipway(&lab.join("root"), &lab.join("state"), args),
        Duration::from_secs(300),
    )
}

/// Builds an image of busybox with its applets and a small /etc into the lab's store as [`BUSYBOX`].
///
/// # Errors
/// The build failed: its output is in the error.
pub fn busybox(lab: &Lab) -> Result<()> {
    let dir = lab.join("busybox-context");
    let bin = dir.join("rootfs/bin");
    std::fs::create_dir_all(&bin)?;
    let source = ["/bin/busybox", "/usr/bin/busybox"]
        .into_iter()
        .find(|p| Path::new(p).exists())
        .context("busybox-static is not installed (tests/setup/test-deps.sh installs it)")?;
    std::fs::copy(source, bin.join("busybox"))?;
    let list = cmd::run(&mut cmd::command(source, ["--list"]), Duration::from_secs(10))?
        .ok()?
        .stdout;
    for applet in list.lines().filter(|a| !a.is_empty() && *a != "busybox") {
        std::os::unix::fs::symlink("busybox", bin.join(applet)).or_else(|e| {
            if e.kind() == std::io::ErrorKind::AlreadyExists {
                Ok(())
            } else {
                Err(e)
            }
        })?;
    }
    for (path, text) in [
        (
            "rootfs/etc/passwd",
            "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\nappuser:x:1000:1000:app:/home/appuser:/bin/sh\n",
        ),
        (
            "rootfs/etc/group",
            "root:x:0:\nnogroup:x:65534:\nappuser:x:1000:\nvideo:x:44:appuser\n",
        ),
        ("rootfs/root/.keep", ""),
        ("rootfs/home/appuser/.keep", ""),
        ("rootfs/tmp/.keep", ""),
        ("rootfs/var/.keep", ""),
        (
            "Dockerfile",
            "FROM scratch\nCOPY rootfs/ /\nENV PATH=/bin\nCMD [\"sh\"]\n",
        ),
    ] {
        let p = dir.join(path);
        if let Some(parent) = p.parent() {
            std::fs::create_dir_all(parent)?;
        }
        std::fs::write(p, text)?;
    }
    run_slipway(lab, &["build", "-t", BUSYBOX, &dir.display().to_string()])?
        .ok()
        .context("building busybox")?;
    Ok(())
}

/// Builds a stage of tests/images/Dockerfile (its context lies in the cache) into the store below `dir` and pushes it to
/// `registry` as `name` (a repository with its tag).
///
/// # Errors
/// The context is not there, the build or the push failed: the output is in the error.
pub fn stage(dir: &Path, registry: &Registry, stage: &str, args: &[&str], name: &str) -> Result<()> {
    let context = lab::cache().join("lab-images");
    anyhow::ensure!(
        context.join("made").exists(),
        "{} is not there (tests/setup/lab-rootfs.sh makes it)",
        context.display()
    );
    let full = format!("{}/{name}", registry.host());
    let mut build = slipway(
        &dir.join("root"),
        &dir.join("state"),
        &["build", "-q", "--push", "--target", stage, "-t", &full],
    );
    for a in args {
        build.args(["--build-arg", a]);
    }
    build.arg(&context);
    cmd::run(&mut build, Duration::from_secs(300))?
        .ok()
        .with_context(|| format!("building {name}"))?;
    Ok(())
}

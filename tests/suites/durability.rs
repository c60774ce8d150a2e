//! Pulls and builds that are killed half-way, or run out of disk: the store is as it was, and the next one works.
#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use harness::cri::{Cri, container_config, pod_config};
use harness::forge::{Entry, Forge, layer};
use harness::image::{self, BUSYBOX, run_slipway};
use harness::registry::Registry;
use harness::{Daemon, Lab, Setup, World, cmd, leftovers, v1};

/// Failpoints of slipwayd and of the store that begin so.
fn points(prefixes: &[&str]) -> Result<Vec<String>> {
    let mut command = cmd::command(harness::lab::bin("slipwayd"), ["failpoints"]);
    let listed = cmd::run(&mut command, Duration::from_secs(10))?.ok()?.stdout;
    let found: Vec<String> = listed
        .lines()
        .filter(|line| prefixes.iter().any(|prefix| line.starts_with(prefix)))
        .map(str::to_owned)
        .collect();
    for prefix in prefixes {
        ensure!(
            found.iter().any(|point| point.starts_with(prefix)),
            "no failpoint {prefix}* is known"
        );
    }
    Ok(found)
}

/// The variable that makes a program die at a point.
fn deadly(point: &str) -> (String, String) {
    match point.strip_prefix("store.") {
        Some(name) => ("SLIPWAY_STORE_FAILPOINT".to_owned(), name.to_owned()),
        None => ("SLIPWAY_FAILPOINTS".to_owned(), format!("{point}=kill")),
    }
}

/// Everything in the store's directories, by name: what must be as before when nothing has leaked.
fn stored(root: &Path) -> Result<BTreeSet<String>> {
    let mut found = BTreeSet::new();
    for dir in [
        "content/sha256",
        "content/ingest",
        "snapshots",
        "cache-mounts",
        "volumes",
    ] {
        for entry in std::fs::read_dir(root.join(dir)).into_iter().flatten() {
            found.insert(format!("{dir}/{}", entry?.file_name().to_string_lossy()));
        }
    }
    Ok(found)
}

/// An image in three layers that can run `/bin/busybox`.
fn runnable(forge: &Forge) -> Result<String> {
    let busybox = ["/bin/busybox", "/usr/bin/busybox"]
        .iter()
        .find_map(|path| std::fs::read(path).ok())
        .context("busybox-static is not installed")?;
    let layers = [
        layer(&[
            Entry::dir("bin/"),
            Entry::file("bin/busybox", &busybox).mode(0o755),
        ])?,
        layer(&[
            Entry::dir("etc/"),
            Entry::file("etc/passwd", b"root:x:0:0::/:/bin/sh\n"),
        ])?,
        layer(&[
            Entry::hard("bin/sh", "bin/busybox"),
            Entry::file("data/x", &vec![7; 300_000]),
        ])?,
    ];
    forge.image("1", &layers, |_| {})
}

/// Runs a container of an image to its end.
async fn runs(w: &World, name: &str, image: &str, command: &[&str]) -> Result<()> {
    let config = pod_config(name, &w.lab, true);
    let pod = w.cri.run_pod(config.clone()).await?;
    let id = w
        .cri
        .run(&pod, container_config("main", image, command), config)
        .await?;
    let status = w.cri.wait_exit(&id, Duration::from_secs(20)).await?;
    ensure!(status.exit_code == 0, "{image} ended with {status:?}");
    w.cri.remove_pod(&pod).await
}

async fn remove(cri: &Cri, image: &str) -> Result<()> {
    let image = Some(v1::ImageSpec {
        image: image.to_owned(),
        ..Default::default()
    });
    let request = v1::RemoveImageRequest { image };
    cri.image.clone().remove_image(request).await?;
    Ok(())
}

async fn names(cri: &Cri) -> Result<BTreeSet<String>> {
    let images = cri.images().await?;
    Ok(images.into_iter().flat_map(|image| image.repo_tags).collect())
}

#[tokio::test]
async fn a_kill_at_any_point_of_a_pull_leaks_nothing_and_the_next_pull_succeeds() -> Result<()> {
    let mut w = World::new("dur-pull").await?;
    let registry = Registry::start(&w.lab, None)?;
    let name = runnable(&Forge::new(&registry.host(), "kill/pull"))?;
    run_slipway(&w.lab, &["prune"])?.ok()?;
    let before = stored(w.daemon.root())?;
    let points = points(&[
        "pull_image.",
        "store.ingest.",
        "store.unpack.",
        "store.commit.",
        "store.commit_image.",
    ])?;
    for (n, point) in points.iter().enumerate() {
        w.daemon.stop()?;
        w.restart(&Setup {
            env: vec![deadly(point)],
            ..Default::default()
        })
        .await?;
        let pulled = w.cri.pull(&name).await;
        ensure!(pulled.is_err(), "{point}: slipwayd was to die there");
        w.daemon
            .wait_end(Duration::from_secs(10))
            .await
            .with_context(|| format!("{point} was never reached: {pulled:?}"))?;
        w.restart(&Setup::default()).await?;
        let ingests = stored(w.daemon.root())?;
        ensure!(
            !ingests.iter().any(|file| file.starts_with("content/ingest")),
            "{point}: {ingests:?}"
        );
        let listed = names(&w.cri).await?;
        ensure!(listed.contains(BUSYBOX), "{point}: {listed:?}");
        if listed.contains(&name) {
            // It died after the image was made: then that image is whole.
            runs(&w, &format!("had{n}"), &name, &["/bin/sh", "-c", "true"]).await?;
        }
        w.cri
            .pull(&name)
            .await
            .with_context(|| format!("{point}: again"))?;
        runs(&w, &format!("got{n}"), &name, &["/bin/sh", "-c", "true"])
            .await
            .with_context(|| format!("{point}: run"))?;
        remove(&w.cri, &name).await?;
        run_slipway(&w.lab, &["prune"])?.ok()?;
        let after = stored(w.daemon.root())?;
        let leaked: Vec<_> = after.difference(&before).collect();
        ensure!(leaked.is_empty(), "{point} leaks {leaked:?}");
        ensure!(before.is_subset(&after), "{point} took something that was in use");
    }
    w.finish().await
}

#[tokio::test]
async fn a_kill_at_any_point_of_a_removal_leaks_nothing_and_the_image_comes_back_whole() -> Result<()> {
    let mut w = World::new("dur-remove").await?;
    let registry = Registry::start(&w.lab, None)?;
    let name = runnable(&Forge::new(&registry.host(), "kill/remove"))?;
    run_slipway(&w.lab, &["prune"])?.ok()?;
    let before = stored(w.daemon.root())?;
    for (n, point) in points(&["store.remove_image.", "store.gc."])?.iter().enumerate() {
        w.cri.pull(&name).await?;
        w.daemon.stop()?;
        w.restart(&Setup {
            env: vec![deadly(point)],
            ..Default::default()
        })
        .await?;
        let removed = remove(&w.cri, &name).await;
        w.daemon
            .wait_end(Duration::from_secs(10))
            .await
            .with_context(|| format!("{point} was never reached: {removed:?}"))?;
        w.restart(&Setup::default()).await?;
        if names(&w.cri).await?.contains(&name) {
            runs(&w, &format!("had{n}"), &name, &["/bin/sh", "-c", "true"]).await?;
        }
        w.cri
            .pull(&name)
            .await
            .with_context(|| format!("{point}: again"))?;
        runs(&w, &format!("got{n}"), &name, &["/bin/sh", "-c", "true"])
            .await
            .with_context(|| format!("{point}: run"))?;
        remove(&w.cri, &name).await?;
        run_slipway(&w.lab, &["prune"])?.ok()?;
        let after = stored(w.daemon.root())?;
        let leaked: Vec<_> = after.difference(&before).collect();
        ensure!(leaked.is_empty(), "{point} leaks {leaked:?}");
    }
    w.finish().await
}

fn context(lab: &Lab, name: &str, dockerfile: &str) -> Result<String> {
    lab.write(Path::new(name).join("Dockerfile"), dockerfile)?;
    lab.write(Path::new(name).join("file"), "text")?;
    Ok(lab.join(name).display().to_string())
}

/// A build that is killed at a point, with slipwayd up or down, and what comes after it.
async fn killed_builds(daemon_up: bool) -> Result<()> {
    let mut w = World::new("dur-build").await?;
    let registry = Registry::start(&w.lab, None)?;
    let name = format!("{}/kill/build:1", registry.host());
    let dockerfile = format!(
        "FROM {BUSYBOX} AS one\nRUN --mount=type=cache,target=/c echo made > /made && touch /c/kept\nFROM {BUSYBOX}\nCOPY --from=one /made /made\nCOPY file /file\nRUN rm /file && head -c 16 /dev/urandom > /more\n"
    );
    let dir = context(&w.lab, "c", &dockerfile)?;
    let args = [
        "build",
        "--no-cache",
        "--push",
        "--progress",
        "plain",
        "-t",
        &name,
        &dir,
    ];
    // Once without a fault: the cache mount and the cache are there from now on.
    run_slipway(&w.lab, &args)?.ok()?;
    run_slipway(&w.lab, &["rmi", &name])?.ok()?;
    run_slipway(&w.lab, &["prune"])?.ok()?;
    let before = stored(w.daemon.root())?;
    let mut points = points(&[
        "store.prepare.",
        "store.commit.",
        "store.commit_image.",
        "store.ingest.",
    ])?;
    if !daemon_up {
        // The rest is the same whoever looks on.
        points.retain(|point| point.starts_with("store.commit"));
    }
    for (n, point) in points.iter().enumerate() {
        if !daemon_up {
            w.daemon.stop()?;
        }
        let (key, value) = deadly(point);
        let mut build = image::slipway(&w.lab.join("root"), &w.lab.join("state"), &args);
        let status = build
            .env(key, value)
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .status()?;
        ensure!(
            status.signal() == Some(9),
            "{point}: the build was to die there, but ended with {status}"
        );
        if !daemon_up {
            w.restart(&Setup::default()).await?;
        }
        let listed = names(&w.cri).await?;
        ensure!(listed.contains(BUSYBOX), "{point}: {listed:?}");
        if listed.contains(&name) {
            runs(&w, &format!("had{n}"), &name, &["cat", "/made", "/more"]).await?;
        }
        run_slipway(&w.lab, &args)?
            .ok()
            .with_context(|| format!("{point}: again"))?;
        runs(&w, &format!("got{n}"), &name, &["cat", "/made", "/more"])
            .await
            .with_context(|| format!("{point}: run"))?;
        let builds = std::fs::read_dir(w.daemon.state().join("builds"))
            .into_iter()
            .flatten()
            .count();
        ensure!(builds == 0, "{point} leaves {builds} directories of builds");
        let shims = leftovers::processes_naming(&w.daemon.state().join("builds"));
        ensure!(shims.is_empty(), "{point} leaves {shims:?}");
        run_slipway(&w.lab, &["rmi", &name])?.ok()?;
        run_slipway(&w.lab, &["prune"])?.ok()?;
        let after = stored(w.daemon.root())?;
        let leaked: Vec<_> = after.difference(&before).collect();
        ensure!(leaked.is_empty(), "{point} leaks {leaked:?}");
        ensure!(before.is_subset(&after), "{point} took something that was in use");
    }
    w.finish().await
}

#[tokio::test]
async fn a_kill_at_any_point_of_a_builds_commit_leaks_nothing_with_slipwayd_up() -> Result<()> {
    killed_builds(true).await
}

#[tokio::test]
async fn a_kill_at_any_point_of_a_builds_commit_leaks_nothing_with_slipwayd_down() -> Result<()> {
    killed_builds(false).await
}

/// A lab whose store lies on a small file system of its own.
struct Tiny {
    lab: Option<Lab>,
    root: PathBuf,
}

impl Tiny {
    fn new(what: &str, size: &str) -> Result<Tiny> {
        let lab = Lab::new(what)?;
        let root = lab.join("root");
        std::fs::create_dir_all(&root)?;
        cmd::sh(&format!("mount -t tmpfs -o size={size} tmpfs {}", root.display()))?;
        Ok(Tiny { lab: Some(lab), root })
    }

    fn lab(&self) -> &Lab {
        self.lab.as_ref().expect("until the end")
    }

    fn free(&self) -> Result<u64> {
        let fs = rustix::fs::statvfs(&self.root)?;
        Ok(fs.f_bavail * fs.f_frsize)
    }

    fn finish(mut self) -> Result<()> {
        cmd::sh(&format!("umount {}", self.root.display()))?;
        self.lab.take().map_or(Ok(()), Lab::finish)
    }
}

impl Drop for Tiny {
    fn drop(&mut self) {
        if self.lab.is_some() {
            let _ = cmd::sh(&format!("umount -l {}", self.root.display()));
        }
    }
}

/// Bytes that a file system may take for itself after much was written and removed.
const SLACK: u64 = 2 << 20;

#[tokio::test]
async fn a_disk_that_fills_up_during_a_pull_is_told_and_given_back() -> Result<()> {
    let tiny = Tiny::new("dur-full-pull", "64m")?;
    let registry = Registry::start(tiny.lab(), None)?;
    image::busybox(tiny.lab())?;
    let noise = |seed: u64, length: usize| -> Vec<u8> {
        let mut state = seed | 1;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()
        };
        (0..length / 8).flat_map(|_| next()).collect()
    };
    // Three ways to run out: of room for blobs, of room for files that compress well, and in the second layer only.
    let incompressible = [layer(&[Entry::file("a", &noise(3, 70 << 20))])?];
    let bomb = [layer(&[Entry::file("zeros", &vec![0; 90 << 20])])?];
    let second = [
        layer(&[Entry::file("a", &noise(5, 1 << 20))])?,
        layer(&[Entry::file("b", &noise(7, 40 << 20))])?,
    ];
    let forge = Forge::new(&registry.host(), "full/pull");
    let small = runnable(&forge)?;
    let mut daemon = Daemon::start(tiny.lab(), &Setup::default()).await?;
    let cri = daemon.cri().await?;
    let pod_config = pod_config("beside", tiny.lab(), true);
    let pod = cri.run_pod(pod_config.clone()).await?;
    let beside = cri
        .run(
            &pod,
            container_config("main", BUSYBOX, &["sleep", "1000"]),
            pod_config,
        )
        .await?;
    run_slipway(tiny.lab(), &["prune"])?.ok()?;
    let (before, free) = (stored(&tiny.root)?, tiny.free()?);
    for (tag, layers) in [
        ("noise", &incompressible[..]),
        ("bomb", &bomb[..]),
        ("second", &second[..]),
    ] {
        let name = forge.image(tag, layers, |_| {})?;
        let error = cri.pull(&name).await.expect_err("it cannot fit");
        let said = format!("{error:#}").to_lowercase();
        ensure!(said.contains("space"), "{tag}: {said}");
        ensure!(
            stored(&tiny.root)? == before,
            "{tag} leaves {:?}",
            stored(&tiny.root)?
        );
        ensure!(
            tiny.free()? + SLACK > free,
            "{tag}: {} of {free} bytes came back",
            tiny.free()?
        );
        ensure!(!names(&cri).await?.contains(&name));
        // The service goes on, also for what was running.
        ensure!(cri.exec(&beside, &["true"], 10).await?.0 == 0);
        cri.pull(&small).await.with_context(|| format!("after {tag}"))?;
        remove(&cri, &small).await?;
        run_slipway(tiny.lab(), &["prune"])?.ok()?;
    }
    drop(registry);
    daemon.drain().await?;
    drop(daemon);
    tiny.finish()
}

#[tokio::test]
async fn a_disk_that_fills_up_during_a_build_is_told_and_given_back() -> Result<()> {
    let tiny = Tiny::new("dur-full-build", "64m")?;
    let registry = Registry::start(tiny.lab(), None)?;
    image::busybox(tiny.lab())?;
    let mut daemon = Daemon::start(tiny.lab(), &Setup::default()).await?;
    let cri = daemon.cri().await?;
    let copied = context(tiny.lab(), "copied", &format!("FROM {BUSYBOX}\nCOPY . /d/\n"))?;
    cmd::sh(&format!("head -c 80000000 /dev/urandom > {copied}/big"))?;
    let written = context(
        tiny.lab(),
        "written",
        &format!("FROM {BUSYBOX}\nRUN echo begun; dd if=/dev/zero of=/big bs=1M count=100\n"),
    )?;
    let fits = context(
        tiny.lab(),
        "fits",
        &format!("FROM {BUSYBOX}\nRUN head -c 38000000 /dev/urandom > /noise\n"),
    )?;
    let small = context(tiny.lab(), "small", &format!("FROM {BUSYBOX}\nRUN echo x > /x\n"))?;
    let build = |args: &[&str]| {
        let mut all = vec!["build", "--no-cache", "--progress", "plain"];
        all.extend(args);
        run_slipway(tiny.lab(), &all)
    };
    run_slipway(tiny.lab(), &["prune"])?.ok()?;
    let (before, free) = (stored(&tiny.root)?, tiny.free()?);
    let nothing_left = |what: &str| -> Result<()> {
        let leaked: Vec<String> = stored(&tiny.root)?.difference(&before).cloned().collect();
        ensure!(leaked.is_empty(), "{what} leaves {leaked:?}");
        ensure!(
            tiny.free()? + SLACK > free,
            "{what}: {} of {free} bytes came back",
            tiny.free()?
        );
        let builds = std::fs::read_dir(tiny.lab().join("state/builds"))
            .into_iter()
            .flatten();
        ensure!(builds.count() == 0, "{what} leaves a build's directory");
        Ok(())
    };
    for (what, dir) in [("COPY", &copied), ("RUN", &written)] {
        let o = build(&["-t", "full:1", dir])?;
        ensure!(
            o.code != 0 && o.stderr.to_lowercase().contains("space"),
            "{what}: {o:?}"
        );
        ensure!(
            o.stderr.contains("Dockerfile:2"),
            "{what} names the line: {}",
            o.stderr
        );
        ensure!(!names(&cri).await?.iter().any(|name| name.contains("full")));
        nothing_left(what)?;
        build(&["-t", "small:1", &small])?
            .ok()
            .with_context(|| format!("after {what}"))?;
        run_slipway(tiny.lab(), &["rmi", "small:1"])?.ok()?;
        run_slipway(tiny.lab(), &["prune"])?.ok()?;
    }
    // The image fits, its blob beside it does not: the image stays, and the push is what fails.
    let name = format!("{}/full/fits:1", registry.host());
    let o = build(&["-t", &name, "--push", &fits])?;
    ensure!(
        o.code != 0 && o.stderr.to_lowercase().contains("space"),
        "push: {o:?}"
    );
    ensure!(names(&cri).await?.contains(&name), "what was built is there");
    let ingests = stored(&tiny.root)?;
    ensure!(
        !ingests.iter().any(|file| file.starts_with("content/ingest")),
        "{ingests:?}"
    );
    run_slipway(tiny.lab(), &["rmi", &name])?.ok()?;
    run_slipway(tiny.lab(), &["prune"])?.ok()?;
    nothing_left("a push")?;
    let pod_config = pod_config("after", tiny.lab(), true);
    let pod = cri.run_pod(pod_config.clone()).await?;
    let id = cri
        .run(&pod, container_config("main", BUSYBOX, &["true"]), pod_config)
        .await?;
    ensure!(cri.wait_exit(&id, Duration::from_secs(10)).await?.exit_code == 0);
    drop(registry);
    daemon.drain().await?;
    drop(daemon);
    tiny.finish()
}

//! `slipway build` as people call it, on the node's store, with no daemon.
#![forbid(unsafe_code)]

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use harness::cmd::{self, Output};
use harness::image::{self, BUSYBOX, run_slipway};
use harness::{Lab, World, lab, leftovers};

/// A corner with a busybox image in its store, without slipwayd.
fn bench(what: &str) -> Result<Lab> {
    let lab = Lab::new(what)?;
    image::busybox(&lab)?;
    Ok(lab)
}

fn context(lab: &Lab, name: &str, files: &[(&str, &str)]) -> Result<String> {
    for (path, text) in files {
        lab.write(Path::new(name).join(path), text)?;
    }
    Ok(lab.join(name).display().to_string())
}

fn build(lab: &Lab, args: &[&str]) -> Result<Output> {
    let mut all = vec!["build", "--progress", "plain"];
    all.extend(args);
    run_slipway(lab, &all)
}

fn inspect(lab: &Lab, name: &str) -> Result<serde_json::Value> {
    Ok(serde_json::from_str(
        &run_slipway(lab, &["inspect", "--format", "json", name])?
            .ok()?
            .stdout,
    )?)
}

/// What a command prints in the image, by a build that runs it.
fn look(lab: &Lab, name: &str, script: &str) -> Result<String> {
    let dir = context(
        lab,
        "look",
        &[("Dockerfile", &format!("FROM {name}\nRUN {script}\n"))],
    )?;
    let o = build(lab, &["--no-cache", &dir])?.ok()?;
    Ok(o.stdout + &o.stderr)
}

#[test]
fn the_context_stands_anywhere_and_flags_are_spelled_as_docker_does() -> Result<()> {
    let lab = bench("b-args")?;
    let dir = context(
        &lab,
        "c",
        &[
            (
                "Dockerfile",
                &format!("FROM {BUSYBOX}\nARG V=none\nRUN echo v=$V > /v\n"),
            ),
            ("other.dockerfile", "FROM scratch\nCOPY Dockerfile /d\n"),
        ],
    )?;
    build(&lab, &[&dir, "-t", "a/b:1", "--build-arg", "V=one", "--rm"])?.ok()?;
    build(&lab, &["--tag=a/c:1", &dir, "--build-arg=V=two"])?.ok()?;
    build(
        &lab,
        &["-t", "a/d:1", "-f", &format!("{dir}/other.dockerfile"), &dir],
    )?
    .ok()?;
    let o = run_slipway(&lab, &["images", "--format", "json"])?.ok()?;
    for name in ["a/b", "a/c", "a/d"] {
        assert!(o.stdout.contains(name), "{name} is not in {}", o.stdout);
    }
    let o = build(&lab, &["-t", "x"])?;
    assert!(o.code != 0 && o.stderr.contains("context"), "{o:?}");
    let o = build(&lab, &["-f", &format!("{dir}/othr.dockerfile"), &dir])?;
    assert!(
        o.code != 0 && o.stderr.contains("other.dockerfile"),
        "it suggests what is there: {o:?}"
    );
    let o = build(&lab, &["--ssh", "default", &dir])?;
    assert!(o.code != 0 && o.stderr.contains("ssh"), "{o:?}");
    lab.finish()
}

#[test]
fn a_step_is_cached_by_content_and_run_again_when_it_changes() -> Result<()> {
    let lab = bench("b-cache")?;
    let dockerfile =
        format!("FROM {BUSYBOX}\nWORKDIR /app\nCOPY req.txt .\nRUN date +%N > /stamp\nCOPY main.py .\n");
    let dir = context(
        &lab,
        "c",
        &[
            ("Dockerfile", &dockerfile),
            ("req.txt", "numpy\n"),
            ("main.py", "print(1)\n"),
        ],
    )?;
    build(&lab, &["-t", "c:1", &dir])?.ok()?;
    let second = build(&lab, &["-t", "c:2", &dir])?.ok()?;
    assert_eq!(
        (second.stdout + &second.stderr).matches("CACHED").count(),
        4,
        "all four steps"
    );
    assert_eq!(inspect(&lab, "c:1")?["id"], inspect(&lab, "c:2")?["id"]);
    // A touch is no change; an edit of the last file runs one step only.
    cmd::sh(&format!("touch {dir}/req.txt"))?;
    std::fs::write(lab.join("c/main.py"), "print(2)\n")?;
    let third = build(&lab, &["-t", "c:3", &dir])?.ok()?;
    assert_eq!((third.stdout + &third.stderr).matches("CACHED").count(), 3);
    std::fs::write(lab.join("c/req.txt"), "scipy\n")?;
    let fourth = build(&lab, &["-t", "c:4", &dir])?.ok()?;
    assert_eq!(
        (fourth.stdout + &fourth.stderr).matches("CACHED").count(),
        1,
        "only WORKDIR"
    );
    lab.finish()
}

#[test]
fn a_failed_step_shows_where_and_why_and_leaves_nothing() -> Result<()> {
    let lab = bench("b-fail")?;
    let dir = context(
        &lab,
        "c",
        &[(
            "Dockerfile",
            &format!("FROM {BUSYBOX}\nRUN echo fine\nRUN echo the reason; echo to stderr >&2; exit 42\n"),
        )],
    )?;
    let o = build(&lab, &["-t", "f:1", &dir])?;
    assert_ne!(o.code, 0);
    for want in ["Dockerfile:3", "exit 42", "42", "the reason", "to stderr"] {
        assert!(o.stderr.contains(want), "{want:?} is not in\n{}", o.stderr);
    }
    let o = run_slipway(&lab, &["inspect", "f:1"])?;
    assert_ne!(o.code, 0, "no image was made");
    assert!(leftovers::find(&lab).is_empty(), "{:?}", leftovers::find(&lab));
    lab.finish()
}

#[test]
fn stages_copy_from_each_other_and_only_what_is_needed_runs() -> Result<()> {
    let lab = bench("b-stages")?;
    let text = format!(
        "FROM {BUSYBOX} AS builder\nRUN mkdir /out && echo made > /out/file && ln -s file /out/link\nFROM {BUSYBOX} AS unused\nRUN exit 1\nFROM scratch\nCOPY --from=builder /out/ /\nCOPY --from={BUSYBOX} /etc/passwd /passwd\n"
    );
    let dir = context(&lab, "c", &[("Dockerfile", &text)])?;
    build(&lab, &["-t", "s:1", &dir])?.ok()?;
    let o = build(&lab, &["--target", "unused", &dir])?;
    assert_ne!(o.code, 0);
    let o = build(&lab, &["--target", "buildr", &dir])?;
    assert!(o.code != 0 && o.stderr.contains("builder"), "did you mean: {o:?}");
    let view = context(
        &lab,
        "v",
        &[(
            "Dockerfile",
            &format!("FROM {BUSYBOX}\nCOPY --from=s:1 / /got\nRUN ls -l /got; cat /got/file /got/link\n"),
        )],
    )?;
    let o = build(&lab, &[&view])?.ok()?;
    let out = o.stdout + &o.stderr;
    assert!(
        out.contains("made") && out.contains("link -> file") && out.contains("passwd"),
        "{out}"
    );
    lab.finish()
}

#[test]
fn the_ignore_file_is_honoured() -> Result<()> {
    let lab = bench("b-ignore")?;
    let dir = context(
        &lab,
        "c",
        &[
            (
                "Dockerfile",
                &format!("FROM {BUSYBOX}\nCOPY . /ctx\nRUN find /ctx -type f | sort\n"),
            ),
            (".dockerignore", "*.log\n**/tmp\n!keep.log\nDockerfile\n"),
            ("a.txt", "a"),
            ("b.log", "b"),
            ("keep.log", "k"),
            ("sub/tmp/x", "x"),
            ("sub/y", "y"),
        ],
    )?;
    let o = build(&lab, &[&dir])?.ok()?;
    let out = o.stdout + &o.stderr;
    for want in ["/ctx/a.txt", "/ctx/keep.log", "/ctx/sub/y"] {
        assert!(out.contains(want), "{want} is not in {out}");
    }
    for not in ["/ctx/b.log", "/ctx/sub/tmp", "/ctx/Dockerfile"] {
        assert!(!out.contains(not), "{not} is in {out}");
    }
    lab.finish()
}

#[test]
fn two_builds_on_two_roots_with_a_source_date_are_the_same_image() -> Result<()> {
    let ids = ["b-date1", "b-date2"].map(|what| -> Result<(String, Lab)> {
        let lab = Lab::new(what)?;
        let mut c = image::slipway(&lab.join("root"), &lab.join("state"), &["build", "-t", "base:1", "."]);
        let dir = context(&lab, "base", &[("Dockerfile", "FROM scratch\nCOPY bin/ /bin/\nENV PATH=/bin\n")])?;
        std::fs::create_dir_all(lab.join("base/bin"))?;
        std::fs::copy("/bin/busybox", lab.join("base/bin/busybox"))?;
        std::os::unix::fs::symlink("busybox", lab.join("base/bin/sh"))?;
        cmd::run(c.current_dir(&dir).env("SOURCE_DATE_EPOCH", "1700000000"), Duration::from_secs(60))?.ok()?;
        let dir = context(&lab, "c", &[("Dockerfile", "FROM base:1\nWORKDIR /w\nRUN echo x > made && busybox mkdir d && busybox touch d/e\nCOPY f g/\nENTRYPOINT [\"sh\"]\n"), ("f", "text")])?;
        let mut c = image::slipway(&lab.join("root"), &lab.join("state"), &["build", "-t", "same:1", &dir]);
        cmd::run(c.env("SOURCE_DATE_EPOCH", "1700000000"), Duration::from_secs(60))?.ok()?;
        std::thread::sleep(Duration::from_millis(1100));
        Ok((inspect(&lab, "same:1")?["id"].to_string(), lab))
    });
    let [a, b] = ids;
    let ((a, la), (b, lb)) = (a?, b?);
    assert_eq!(a, b);
    la.finish()?;
    lb.finish()
}

#[test]
fn an_interrupt_leaves_nothing() -> Result<()> {
    let lab = bench("b-int")?;
    let dir = context(
        &lab,
        "c",
        &[(
            "Dockerfile",
            &format!("FROM {BUSYBOX}\nRUN echo begun; sleep 600\n"),
        )],
    )?;
    let mut child = image::slipway(
        &lab.join("root"),
        &lab.join("state"),
        &["build", "--progress", "plain", &dir],
    )
    .stdout(std::fs::File::create(lab.join("out"))?)
    .stderr(std::fs::File::create(lab.join("err"))?)
    .spawn()?;
    wait_for(&lab, "begun")?;
    let pid = rustix::process::Pid::from_raw(i32::try_from(child.id())?).expect("a pid");
    let began = Instant::now();
    rustix::process::kill_process(pid, rustix::process::Signal::INT)?;
    let status = child.wait()?;
    assert!(!status.success());
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    assert!(leftovers::find(&lab).is_empty(), "{:?}", leftovers::find(&lab));
    lab.finish()
}

fn wait_for(lab: &Lab, text: &str) -> Result<()> {
    let began = Instant::now();
    loop {
        let out = ["out", "err"]
            .map(|f| std::fs::read_to_string(lab.join(f)).unwrap_or_default())
            .concat();
        // The step's own line names the command: wait for the output itself.
        if out.lines().any(|l| l.ends_with(text)) {
            return Ok(());
        }
        anyhow::ensure!(
            began.elapsed() < Duration::from_secs(20),
            "{text:?} did not appear:\n{out}"
        );
        std::thread::sleep(Duration::from_millis(20));
    }
}

async fn a_killed_build(daemon_up: bool) -> Result<()> {
    let mut w = World::new("b-kill").await?;
    if !daemon_up {
        w.daemon.stop()?;
    }
    let text = format!("FROM {BUSYBOX}\nRUN echo begun; sleep 600\n");
    let dir = context(&w.lab, "c", &[("Dockerfile", &text)])?;
    let spawn = |out: &str| -> Result<std::process::Child> {
        Ok(image::slipway(
            w.daemon.root(),
            w.daemon.state(),
            &["build", "--no-cache", "--progress", "plain", &dir],
        )
        .stdout(std::fs::File::create(w.lab.join(out))?)
        .stderr(std::process::Stdio::null())
        .spawn()?)
    };
    let mut child = spawn("out")?;
    wait_for(&w.lab, "begun")?;
    child.kill()?;
    child.wait()?;
    // Another build is alive meanwhile, and is not touched by who cleans up after the dead one.
    std::fs::write(w.lab.join("out"), "")?;
    let mut alive = spawn("out")?;
    wait_for(&w.lab, "begun")?;
    if daemon_up {
        w.daemon.stop()?;
    }
    w.restart(&harness::Setup::default()).await?;
    let shims = || {
        leftovers::processes_naming(w.lab.path())
            .into_iter()
            .filter(|(_, c)| c.contains("containerd-shim-slipway-v1"))
            .count()
    };
    let began = Instant::now();
    while shims() > 1 && began.elapsed() < Duration::from_secs(10) {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(shims(), 1, "the dead build's shim is gone, the live one's stays");
    assert!(alive.try_wait()?.is_none());
    let pid = rustix::process::Pid::from_raw(i32::try_from(alive.id())?).expect("a pid");
    rustix::process::kill_process(pid, rustix::process::Signal::INT)?;
    alive.wait()?;
    w.finish().await
}

#[tokio::test]
async fn a_killed_build_is_cleaned_by_the_next_to_open_the_store_with_slipwayd_down() -> Result<()> {
    a_killed_build(false).await
}

#[tokio::test]
async fn a_killed_build_is_cleaned_by_the_next_to_open_the_store_with_slipwayd_up() -> Result<()> {
    a_killed_build(true).await
}

#[test]
fn what_is_not_built_yet_is_an_error_that_names_it() -> Result<()> {
    let lab = bench("b-unknown")?;
    for (line, word) in [
        ("RUN --mount=type=ssh true", "ssh"),
        ("RUNN true", "RUN"),
        ("COPY --from=nowhere /a /b", "nowhere"),
        ("COPY --frm=x /a /b", "did you mean"),
    ] {
        let dir = context(&lab, "c", &[("Dockerfile", &format!("FROM {BUSYBOX}\n{line}\n"))])?;
        let o = build(&lab, &[&dir])?;
        assert!(o.code != 0 && o.stderr.contains(word), "{line}: {o:?}");
        assert!(
            o.stderr.contains("Dockerfile:2") || line.contains("nowhere"),
            "{line}: {}",
            o.stderr
        );
    }
    lab.finish()
}

#[test]
fn run_has_a_home_a_user_and_dockers_capabilities() -> Result<()> {
    let lab = bench("b-run")?;
    let text = format!(
        "FROM {BUSYBOX}\nRUN echo home=$HOME caps=$(grep CapEff /proc/self/status)\nUSER appuser\nRUN echo home=$HOME id=$(id -u):$(id -g)\nWORKDIR sub\nRUN touch mine && ls -ln | tail -1\n"
    );
    let dir = context(&lab, "c", &[("Dockerfile", &text)])?;
    let o = build(&lab, &[&dir])?.ok()?;
    let out = o.stdout + &o.stderr;
    assert!(out.contains("home=/root caps=CapEff: 00000000a80425fb"), "{out}");
    assert!(out.contains("home=/home/appuser id=1000:1000"), "{out}");
    assert!(!look(&lab, BUSYBOX, "ls /run /etc/resolv.conf || true")?.is_empty());
    lab.finish()
}

#[test]
fn a_shim_that_cannot_be_prepared_is_gone_when_its_build_has_failed() -> Result<()> {
    let lab = bench("b-shim")?;
    let text = format!(
        "FROM {BUSYBOX} AS a\nRUN echo a > /a\nFROM {BUSYBOX} AS b\nRUN echo b > /b\nFROM scratch\nCOPY --from=a /a /\nCOPY --from=b /b /\n"
    );
    let dir = context(&lab, "c", &[("Dockerfile", &text)])?;
    // In a mount namespace of its own no cgroup can be made: the shim comes up, and CreatePod fails.
    let script = "for m in $(awk '$3 ~ /^cgroup/ { print $2 }' /proc/self/mounts); do mount -o remount,bind,ro $m; done; exec \"$@\"";
    let slipway = image::slipway(
        &lab.join("root"),
        &lab.join("state"),
        &["build", "--no-cache", "--progress", "plain", &dir],
    );
    let mut unshared = cmd::command(
        "unshare",
        ["-m", "--propagation", "private", "sh", "-c", script, "sh"],
    );
    unshared.arg(slipway.get_program()).args(slipway.get_args());
    let o = cmd::run(&mut unshared, Duration::from_secs(60))?;
    assert_ne!(o.code, 0, "{o:?}");
    assert!(
        o.stderr.contains("shim") && o.stderr.contains("cgroup"),
        "{}",
        o.stderr
    );
    let left = leftovers::find(&lab);
    assert!(left.is_empty(), "{left:?}");
    assert_eq!(std::fs::read_dir(lab.join("state/builds"))?.count(), 0);
    build(&lab, &[&dir])?.ok()?;
    lab.finish()
}

#[test]
fn archives_go_out_and_come_back_the_same() -> Result<()> {
    let lab = bench("b-save")?;
    let id = inspect(&lab, BUSYBOX)?["id"].clone();
    let tar = lab.join("image.tar").display().to_string();
    run_slipway(&lab, &["save", "-o", &tar, BUSYBOX])?.ok()?;
    let other = Lab::new("b-load")?;
    let o = run_slipway(&other, &["load", "-i", &tar])?.ok()?;
    assert!((o.stdout + &o.stderr).contains("busybox"));
    assert_eq!(inspect(&other, BUSYBOX)?["id"], id);
    let history = run_slipway(&other, &["history", BUSYBOX])?.ok()?.stdout;
    assert!(history.contains("COPY"), "{history}");
    run_slipway(&other, &["rmi", BUSYBOX])?.ok()?;
    run_slipway(&other, &["prune"])?.ok()?;
    let left: Vec<String> = std::fs::read_dir(other.join("root/snapshots"))?
        .flatten()
        .map(|e| e.file_name().to_string_lossy().into_owned())
        .filter(|n| !n.starts_with('.'))
        .collect();
    assert!(left.is_empty(), "prune leaves {left:?}");
    other.finish()?;
    lab.finish()
}

#[test]
fn completions_are_printed_for_the_shells() -> Result<()> {
    for shell in ["bash", "zsh", "fish"] {
        let o = cmd::run(
            &mut cmd::command(lab::bin("slipway"), ["completion", shell]),
            Duration::from_secs(10),
        )?
        .ok()?;
        assert!(o.stdout.contains("build"), "{shell}");
    }
    Ok(())
}

#[tokio::test]
async fn a_push_after_prune_makes_the_same_digests() -> Result<()> {
    let w = World::new("b-push").await?;
    let registry = harness::registry::Registry::start(&w.lab, None)?;
    let name = format!("{}/same:1", registry.host());
    let dir = context(
        &w.lab,
        "c",
        &[(
            "Dockerfile",
            &format!("FROM {BUSYBOX}\nRUN echo $RANDOM > /r && mkdir /d && echo x > /d/y\n"),
        )],
    )?;
    build(&w.lab, &["-t", &name, "--push", &dir])?
        .ok()
        .context("build --push")?;
    let digest = |name: &str| -> Result<String> {
        let i = inspect(&w.lab, name)?;
        Ok(i["repo_digests"].to_string())
    };
    let first = digest(&name)?;
    assert!(first.contains("sha256:"), "{first}");
    let blobs = || Ok::<_, anyhow::Error>(std::fs::read_dir(w.daemon.root().join("content/sha256"))?.count());
    assert_eq!(blobs()?, 2, "the base's and the step's");
    run_slipway(&w.lab, &["prune"])?.ok()?;
    assert_eq!(blobs()?, 0, "they can be made again");
    let other = harness::registry::Registry::start(&w.lab, None)?;
    let again = format!("{}/same:1", other.host());
    run_slipway(&w.lab, &["tag", &name, &again])?.ok()?;
    run_slipway(&w.lab, &["push", &again])?.ok()?;
    let digests = |text: &str| -> Vec<String> {
        let mut v: Vec<String> = text
            .split("sha256:")
            .skip(1)
            .map(|s| s.chars().take(64).collect())
            .collect();
        v.sort();
        v.dedup();
        v
    };
    assert_eq!(digests(&digest(&again)?).len(), 1, "{}", digest(&again)?);
    assert_eq!(digests(&digest(&again)?), digests(&first));
    w.finish().await
}

//! Builds that are interrupted, killed, or find the store after such a one.

use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::lab::{BASE, Lab, Said, signal};

fn sleeping(lab: &Lab, name: &str) -> String {
    lab.context(
        name,
        &format!("FROM {BASE}\nRUN echo first > /f\nRUN echo begun; sleep 600\n"),
    )
}

#[test]
fn an_interrupt_leaves_nothing_but_finished_steps() {
    let Some(lab) = Lab::new() else { return };
    let dir = sleeping(&lab, "c");
    for sent in [Signal::INT, Signal::TERM] {
        let mut build = lab.start(&[&dir], "out");
        lab.wait_for("out", "begun");
        let began = Instant::now();
        signal(&build, sent);
        assert_eq!(build.wait().unwrap().code(), Some(130));
        assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
        lab.clean();
    }
    assert_eq!(lab.run(&["images", "-q"]).ok().out.lines().count(), 1);
}

#[test]
fn a_killed_build_is_undone_by_the_next_command_and_a_live_one_is_not_touched() {
    let Some(lab) = Lab::new() else { return };
    let mut killed = lab.start(&["--no-cache", &sleeping(&lab, "c1")], "out1");
    let mut alive = lab.start(&["--no-cache", &sleeping(&lab, "c2")], "out2");
    lab.wait_for("out1", "begun");
    lab.wait_for("out2", "begun");
    killed.kill().unwrap();
    killed.wait().unwrap();
    assert_eq!(builds(&lab), 2, "its directory, mounts and shim are there still");
    lab.run(&["images"]).ok();
    assert_eq!(builds(&lab), 1, "those of the live one stay");
    let shims = lab
        .leftovers()
        .iter()
        .filter(|l| l.contains("containerd-shim-slipway-v1"))
        .count();
    assert_eq!(shims, 1, "{:?}", lab.leftovers());
    assert!(alive.try_wait().unwrap().is_none());
    signal(&alive, Signal::INT);
    alive.wait().unwrap();
}

fn builds(lab: &Lab) -> usize {
    std::fs::read_dir(lab.path("state/builds")).map_or(0, Iterator::count)
}

#[test]
fn a_killed_shim_is_an_error_and_nothing_stays() {
    let Some(lab) = Lab::new() else { return };
    let mut build = lab.start(&[&sleeping(&lab, "c")], "out");
    lab.wait_for("out", "begun");
    let shim = lab
        .leftovers()
        .into_iter()
        .find_map(|l| {
            l.strip_prefix("process ")
                .filter(|l| l.contains("shim-slipway"))
                .map(str::to_owned)
        })
        .unwrap();
    let pid: i32 = shim.split(':').next().unwrap().parse().unwrap();
    rustix::process::kill_process(rustix::process::Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
    let began = Instant::now();
    assert!(!build.wait().unwrap().success());
    assert!(began.elapsed() < Duration::from_secs(30), "{:?}", began.elapsed());
    lab.clean();
}

#[test]
fn a_build_killed_while_it_commits_leaves_a_store_that_builds_the_same_again() {
    let Some(lab) = Lab::new() else { return };
    let text = format!("FROM {BASE}\nWORKDIR /w\nRUN echo x > f\nCOPY Dockerfile .\n");
    let dir = lab.context("c", &text);
    for point in [
        "prepare.after_row",
        "commit.before_sync",
        "commit.after_sync",
        "commit_image.before_row",
        "commit_image.after_row",
    ] {
        lab.run(&["prune"]).ok();
        let killed = lab
            .command(&["build", "-q", "-t", "t:1", &dir])
            .env("SLIPWAY_STORE_FAILPOINT", point)
            .output()
            .unwrap();
        assert_eq!(killed.status.code(), None, "{point} was not reached: {killed:?}");
        // The next build undoes and succeeds; everything it uses is whole.
        let id = lab.run(&["build", "-q", "-t", "t:2", &dir]).ok().out;
        assert_eq!(
            lab.look("t:2", "cat /w/f; ls /w"),
            "x\nDockerfile\nf\n",
            "{point}"
        );
        assert_eq!(lab.inspect("t:2")["id"], id.trim());
        lab.clean();
        lab.run(&["rmi", "-f", id.trim()]).ok();
    }
    lab.run(&["rmi", BASE]).ok();
    lab.run(&["prune"]).ok();
    let left: Vec<_> = std::fs::read_dir(lab.path("root/snapshots"))
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .filter(|n| n != ".empty")
        .collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn a_full_disk_is_a_clear_error_and_gives_the_space_back() {
    let Some(lab) = Lab::new() else { return };
    let small = lab.path("small");
    std::fs::create_dir(&small).unwrap();
    let mount = |args: &[&str]| {
        assert!(
            std::process::Command::new(args[0])
                .args(&args[1..])
                .status()
                .unwrap()
                .success()
        )
    };
    mount(&[
        "mount",
        "-t",
        "tmpfs",
        "-o",
        "size=24m",
        "none",
        small.to_str().unwrap(),
    ]);
    let root = small.join("root");
    let run = |args: &[&str]| Said::from(lab.command_at(&root, args).output().unwrap());
    let tar = lab.path("base.tar").display().to_string();
    lab.run(&["save", "-o", &tar, BASE]).ok();
    run(&["load", "-i", &tar]).ok();
    let dir = lab.context(
        "c",
        &format!("FROM {BASE}\nRUN head -c 60000000 /dev/urandom > /big\n"),
    );
    let full = run(&["build", "--progress", "plain", &dir]).failed();
    assert!(full.err.to_lowercase().contains("no space left"), "{}", full.err);
    lab.write("d/big", &"x".repeat(40_000_000));
    let dir = lab.context("d", &format!("FROM {BASE}\nCOPY big /\n"));
    let full = run(&["build", "--progress", "plain", &dir]).failed();
    assert!(full.err.to_lowercase().contains("no space left"), "{}", full.err);
    let dir = lab.context("e", &format!("FROM {BASE}\nRUN echo it goes on > /f\n"));
    run(&["build", "-q", "-t", "t:1", &dir]).ok();
    mount(&["umount", small.to_str().unwrap()]);
}

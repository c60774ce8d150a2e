//! Builds that are interrupted, killed, or find the store after such a one.

use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::lab::{BASE, Lab, signal};

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

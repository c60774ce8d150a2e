//! How long a create, a start and an exec take. Not run unless asked for (`--ignored --nocapture`), with a release
//! worker in SLIPWAY_TEST_WORKER.
#![allow(clippy::unwrap_used)] // a failure is a failed test

mod common;

use common::Bundle;
use serde_json::json;
use slipway_sys::process;
use std::time::{Duration, Instant};

fn report(what: &str, mut times: Vec<Duration>) {
    times.sort();
    let at = |p: usize| times[times.len() * p / 100].as_secs_f64() * 1000.0;
    println!("{what}: p10 {:.2} p50 {:.2} p90 {:.2} ms", at(10), at(50), at(90));
}

/// CPU time of children waited for so far, user and system.
fn cpu() -> Duration {
    // SAFETY: an all-zero rusage is valid storage for the call.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_CHILDREN, &mut usage);
        usage
    };
    let of = |t: libc::timeval| Duration::new(t.tv_sec as u64, t.tv_usec as u32 * 1000);
    of(usage.ru_utime) + of(usage.ru_stime)
}

fn rounds(what: &str, change: impl Fn(&mut Bundle)) {
    let (mut worker, mut all, mut cgroup, mut remove) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let mut cpu_all = Vec::new();
    for _ in 0..30 {
        let mut b = Bundle::new("true");
        b.config["process"]["args"] = json!(["/bin/true"]);
        change(&mut b);
        let (began, used) = (Instant::now(), cpu());
        b.create().unwrap();
        worker.push(began.elapsed());
        b.start();
        b.wait();
        all.push(began.elapsed());
        cpu_all.push(cpu() - used);
        let began = Instant::now();
        b.cgroup.remove(Duration::from_secs(1)).unwrap();
        remove.push(began.elapsed());
        let path = slipway_sys::cgroup::CgroupPath::parse(&format!("/{}", b.id)).unwrap();
        let began = Instant::now();
        b.cgroup =
            slipway_sys::cgroup::Cgroup::create(&slipway_sys::cgroup::Layout::detect().unwrap(), &path)
                .unwrap();
        cgroup.push(began.elapsed());
    }
    println!("== {what}");
    report("cgroup create", cgroup);
    report("worker", worker);
    report("worker + start + exit", all);
    report("CPU of worker, init and program", cpu_all);
    report("cgroup remove", remove);
}

#[test]
#[ignore = "a measurement"]
fn root_timing_of_create() {
    if !common::root() {
        return;
    }
    rounds("with everything", |_| {});
    rounds("without the cgroup mount", |b| {
        b.config["mounts"]
            .as_array_mut()
            .unwrap()
            .retain(|m| m["type"] != "cgroup");
    });
    rounds("without new net", |b| {
        b.config["linux"]["namespaces"]
            .as_array_mut()
            .unwrap()
            .retain(|m| m["type"] != "network");
    });
    if let Ok(profile) = std::env::var("SLIPWAY_TEST_SECCOMP") {
        let profile: serde_json::Value =
            serde_json::from_str(&std::fs::read_to_string(profile).unwrap()).unwrap();
        rounds("with a seccomp profile", |b| {
            b.config["linux"]["seccomp"] = profile.clone()
        });
    }
}

#[test]
#[ignore = "a measurement"]
fn root_timing_of_exec() {
    if !common::root() {
        return;
    }
    let mut b = Bundle::new("echo ready; exec sleep 60");
    b.run_until_ready();
    let mut p = b.process();
    p.args = vec!["/bin/true".into()];
    for cgroup in [true, false] {
        let mut times = Vec::new();
        for _ in 0..200 {
            let began = Instant::now();
            let init = b.init.as_ref().unwrap();
            let plan = slipway_sys::exec::ExecPlan {
                init_pid: init.pid,
                pidfd: std::os::fd::AsFd::as_fd(&init.pidfd),
                process: &p,
                seccomp_bpf: None,
                cgroup: cgroup.then_some(&b.cgroup),
                stdio: [None; 3],
            };
            let spawned = common::spawn(&plan).unwrap();
            process::wait(spawned.pid).unwrap();
            times.push(began.elapsed());
        }
        report(
            if cgroup {
                "exec with cgroup"
            } else {
                "exec without cgroup"
            },
            times,
        );
    }
}

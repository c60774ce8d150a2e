//! How long the shim's calls take, and what it costs to hold. Not run unless asked for (`--ignored --nocapture`), with release
//! programs in SLIPWAY_TEST_SHIM and SLIPWAY_RUNC.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use slipway_shim_client::{Launcher, pod};
use std::time::{Duration, Instant};

const ROUNDS: usize = 60;

#[derive(Default)]
struct Times {
    rows: Vec<(&'static str, Vec<Duration>)>,
}

impl Times {
    fn add(&mut self, what: &'static str, began: Instant) {
        let took = began.elapsed();
        match self.rows.iter_mut().find(|(name, _)| *name == what) {
            Some((_, times)) => times.push(took),
            None => self.rows.push((what, vec![took])),
        }
    }

    fn print(&mut self) {
        for (what, times) in &mut self.rows {
            times.sort();
            let at = |p: usize| times[times.len() * p / 100].as_secs_f64() * 1000.0;
            println!(
                "{what:10} p10 {:.2} p50 {:.2} p90 {:.2} ms",
                at(10),
                at(50),
                at(90)
            );
        }
    }
}

#[tokio::test]
#[ignore = "a measurement"]
async fn root_timing_of_a_pods_life() {
    if !support::is_root() {
        return;
    }
    let Some(worker) = support::worker() else { return };
    let mut times = Times::default();
    let mut memory = Vec::new();
    for _ in 0..ROUNDS {
        let began = Instant::now();
        let launcher = Launcher {
            shim: std::env::var_os("SLIPWAY_TEST_SHIM").map_or(support::SHIM.into(), Into::into),
            worker: worker.clone(),
        };
        let p = support::pod_by(launcher).await;
        times.add("shim", began);
        let began = Instant::now();
        p.create_pod(|r| {
            r.net = pod::NamespaceMode::Node.into();
            r.uts = pod::NamespaceMode::Node.into();
            r.ipc = pod::NamespaceMode::Pod.into();
        })
        .await;
        times.add("pod", began);
        let container = p.container("c", "sleep 1000");
        let began = Instant::now();
        p.shim.create(container).await.unwrap();
        times.add("create", began);
        let began = Instant::now();
        p.shim.start("c").await.unwrap();
        times.add("start", began);
        for _ in 0..3 {
            let request = pod::ExecRequest {
                container_id: "c".into(),
                args: vec!["/bin/true".into()],
                ..Default::default()
            };
            let began = Instant::now();
            p.shim.exec(request, vec![]).await.unwrap();
            times.add("exec", began);
        }
        memory.push(support::private_kib(p.shim.info().await.unwrap().pid));
        p.shim.kill("c", 9, false).await.unwrap();
        p.exit_of("c").await;
        let began = Instant::now();
        p.shim.delete("c").await.unwrap();
        times.add("delete", began);
        p.finish().await;
    }
    times.print();
    memory.sort();
    println!("memory of its own: {} KiB", memory[memory.len() / 2]);
}

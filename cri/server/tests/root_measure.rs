//! How long the verbs take and how much memory slipwayd holds: figures for people, no verdict.
//!
//! `SLIPWAYD=…/release/slipwayd SLIPWAY_BIN=… LOG_LEVEL=warn cargo test -p slipwayd --test root_measure -- --ignored --nocapture`

#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a panic is how a test says no")]
#![allow(dead_code, reason = "the world has more than is measured")]

mod world;

use std::collections::BTreeMap;
use std::time::Instant;

use world::{World, cannot_run};

const ROUNDS: usize = 20;

/// Where the memory lies: the program and its libraries, the heap, what else is anonymous.
fn breakdown(pid: u32) -> String {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let mut kinds: BTreeMap<String, u64> = BTreeMap::new();
    let mut kind = String::new();
    for line in text.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        if words
            .first()
            .is_some_and(|w| w.contains('-') && !w.ends_with(':'))
        {
            kind = match words.get(5) {
                Some(path) if path.starts_with('/') => {
                    format!("{} {}", path.rsplit('/').next().unwrap(), words[1])
                }
                Some(name) => (*name).to_owned(),
                None => "anonymous".to_owned(),
            };
        } else if words.first() == Some(&"Pss:") {
            *kinds.entry(kind.clone()).or_default() += words[1].parse::<u64>().unwrap();
        }
    }
    let mut kinds: Vec<_> = kinds.into_iter().filter(|(_, kib)| *kib > 64).collect();
    kinds.sort_by_key(|(_, kib)| std::cmp::Reverse(*kib));
    format!("{kinds:?}")
}

#[derive(Default)]
struct Times(BTreeMap<&'static str, Vec<f64>>);

impl Times {
    async fn of<T>(&mut self, what: &'static str, verb: impl Future<Output = Result<T, tonic::Status>>) -> T {
        let began = Instant::now();
        let value = verb.await.unwrap();
        self.0
            .entry(what)
            .or_default()
            .push(began.elapsed().as_secs_f64() * 1e3);
        value
    }

    fn print(&mut self) {
        for (what, times) in &mut self.0 {
            times.sort_by(f64::total_cmp);
            println!(
                "{what:32} median {:7.2} ms   least {:7.2}   most {:7.2}",
                times[times.len() / 2],
                times[0],
                times[times.len() - 1]
            );
        }
    }
}

fn pss(pid: u32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    text.lines()
        .find_map(|l| l.strip_prefix("Pss:"))
        .unwrap()
        .trim()
        .trim_end_matches(" kB")
        .parse()
        .unwrap()
}

/// A world to look at with crictl, until the file `hold` in it is removed.
#[tokio::test]
#[ignore = "waits for a person"]
async fn stand() {
    if cannot_run() {
        return;
    }
    let w = World::new(&[]).await;
    let hold = w.path().join("hold");
    std::fs::write(&hold, "").unwrap();
    println!(
        "crictl -r unix://{0}/state/slipwayd.sock; rm {0}/hold ends it",
        w.path().display()
    );
    while hold.exists() {
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
    }
    w.finish().await;
}

#[tokio::test]
#[ignore = "measures, and takes a while"]
async fn measure() {
    if cannot_run() {
        return;
    }
    let w = World::new(&[]).await;
    println!("PSS at rest {} KiB {}", pss(w.pid()), breakdown(w.pid()));
    let mut times = Times::default();
    for round in 0..ROUNDS {
        for (host, run, gone) in [
            (true, "RunPodSandbox host", "Stop+Remove pod host"),
            (false, "RunPodSandbox CNI", "Stop+Remove pod CNI"),
        ] {
            let config = w.pod_config(&format!("m{round}"), host);
            let pod = times.of(run, w.run_pod(config)).await;
            let id = times
                .of(
                    "CreateContainer",
                    w.create(&pod, w.container_config("c", &["sleep", "1000"])),
                )
                .await;
            times.of("StartContainer", w.start(&id)).await;
            times.of("ExecSync true", w.exec(&id, &["true"], 10)).await;
            times.of("StopContainer 0", w.stop(&id, 0)).await;
            times.of("RemoveContainer", w.remove(&id)).await;
            times
                .of(gone, async {
                    w.stop_pod(&pod).await?;
                    w.remove_pod(&pod).await
                })
                .await;
        }
    }
    times.print();
    println!("PSS after work {} KiB", pss(w.pid()));
    let began = Instant::now();
    let up = (0..20).map(|n| {
        let w = &w;
        async move {
            let pod = w.run_pod(w.pod_config(&format!("t{n}"), false)).await.unwrap();
            let id = w
                .create(&pod, w.container_config("c", &["sleep", "1000"]))
                .await
                .unwrap();
            w.start(&id).await.unwrap();
            pod
        }
    });
    let pods = futures_util::future::join_all(up).await;
    println!("20 pods up at once {:.0} ms", began.elapsed().as_secs_f64() * 1e3);
    println!("PSS with 20 pods {} KiB", pss(w.pid()));
    let began = Instant::now();
    let down = pods.iter().map(|pod| async {
        w.stop_pod(pod).await.unwrap();
        w.remove_pod(pod).await.unwrap();
    });
    futures_util::future::join_all(down).await;
    println!("20 pods down {:.0} ms", began.elapsed().as_secs_f64() * 1e3);
    println!("PSS after all {} KiB {}", pss(w.pid()), breakdown(w.pid()));
    w.finish().await;
}

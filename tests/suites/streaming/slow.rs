//! Clients that take nothing of what they asked for.

use std::cell::Cell;

use anyhow::{Result, ensure};
use harness::cri::container_config;
use harness::image::BUSYBOX;
use harness::process::{Holds, forget_peak, peak};
use harness::spdy::{Spdy, Told, V4};
use harness::websocket::WebSocket;
use harness::{World, v1};

use crate::{SLEEP, at_rest, processes, shim, until};

/// How many there are over each transport.
const CLIENTS: usize = 40;
/// What slipwayd may hold for one of them, in KiB: what waits to be written, what is being written, and what was read.
const EACH: usize = 768;

/// The state of each of the processes with this command line.
fn states(command: &str) -> Vec<char> {
    let mut states = Vec::new();
    for process in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let read = |file: &str| std::fs::read_to_string(process.path().join(file)).unwrap_or_default();
        if read("cmdline") == command {
            let stat = read("stat");
            let after = stat.rsplit(") ").next().unwrap_or_default();
            states.extend(after.chars().next());
        }
    }
    states
}

#[tokio::test]
async fn clients_that_read_nothing_stop_their_commands_and_hold_little() -> Result<()> {
    let w = World::new("st-deaf").await?;
    let (_, id) = w
        .pod_with("deaf", container_config("deaf", BUSYBOX, SLEEP))
        .await?;
    let before = at_rest(&w, &id).await?;
    // A word that only this test's commands say.
    let word = format!("deaf-{}", std::process::id());
    let url = async || -> Result<String> {
        let request = v1::ExecRequest {
            container_id: id.clone(),
            cmd: vec!["yes".into(), word.clone()],
            stdout: true,
            ..Default::default()
        };
        Ok(w.cri.runtime.clone().exec(request).await?.into_inner().url)
    };
    let pids = [w.daemon.pid(), shim(&w)?];
    let held = [Holds::of(pids[0])?, Holds::of(pids[1])?];
    for pid in pids {
        forget_peak(pid)?;
    }
    let (mut spdy, mut web) = (Vec::new(), Vec::new());
    for _ in 0..CLIENTS {
        let mut session = Spdy::open(&url().await?, V4).await?;
        let streams = session.command(&["stdout"]).await?;
        spdy.push((session, streams[1]));
        web.push(WebSocket::open(&url().await?).await?);
    }
    // Each has filled everything on its way, and waits: it sleeps, each time it is looked at.
    let line = format!("yes\0{word}\0");
    let asleep = Cell::new(0);
    until("every command waits", async || {
        let states = states(&line);
        let all = states.len() == 2 * CLIENTS && states.iter().all(|state| *state == 'S');
        asleep.set(if all { asleep.get() + 1 } else { 0 });
        Ok(asleep.get() >= 10)
    })
    .await?;
    let grown = peak(pids[0])?.saturating_sub(held[0].resident);
    eprintln!(
        "{} clients that read nothing: {grown} KiB more at the peak",
        2 * CLIENTS
    );
    ensure!(
        grown < 2 * CLIENTS * EACH,
        "slipwayd holds {grown} KiB more for {} clients",
        2 * CLIENTS
    );
    let grown = peak(pids[1])?.saturating_sub(held[1].resident);
    ensure!(grown < 4 << 10, "the shim holds {grown} KiB more");

    // Whoever begins to read gets what there is, from its beginning on.
    let (session, stdout) = &mut spdy[0];
    let (mut got, wanted) = (Vec::new(), format!("{word}\n").repeat(100_000));
    while got.len() < wanted.len() {
        let told = session.next(|data| got.extend_from_slice(data)).await?;
        ensure!(
            !matches!(told, None | Some(Told::GoAway(_))) && told != Some(Told::End(*stdout)),
            "{told:?} after {} bytes",
            got.len()
        );
    }
    assert!(got.starts_with(wanted.as_bytes()), "another output");
    drop((spdy, web));
    until("the commands are gone", async || {
        Ok(processes(&w, &id).await? == before)
    })
    .await?;
    until("slipwayd holds what it held", async || {
        let now = Holds::of(pids[0])?;
        Ok(now.descriptors <= held[0].descriptors && now.resident <= held[0].resident + 4096)
    })
    .await?;
    w.finish().await
}

//! The streaming servers by themselves, spoken to as kubelet's clients speak to them: kubectl's, kubelet's and the API
//! server's own cost is not in it.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use harness::cri::{container_config, pod_config};
use harness::image::BUSYBOX;
use harness::spdy::{FORWARD, Spdy, Told, V4};
use harness::{Lab, v1};

use crate::peers::Peer;
use crate::table::{Table, median};

/// What goes through in each run.
const MUCH: usize = 512 << 20;
const RUNS: usize = 7;
/// What a client sends at once: as much as one of Go's copies.
const CHUNK: usize = 32 << 10;
/// What a server answers that has got everything.
const DONE: &[u8] = b"all of it";

#[derive(Clone, Copy)]
enum Way {
    Out,
    In,
    Command,
}

/// A peer with a pod on the host's network, and one container in it.
struct Side<'a> {
    peer: &'a Peer,
    pod: String,
    container: String,
}

/// Fills the rows.
pub async fn measure(table: &mut Table, lab: &Lab, ours: &Peer, theirs: &Peer) -> Result<()> {
    let (flood, sink) = (serve(flood)?, serve(count)?);
    let sides = [
        Side::begin(lab, ours, "streams").await?,
        Side::begin(lab, theirs, "streams").await?,
    ];
    for (what, way) in [
        ("port-forward, out of the pod", Way::Out),
        ("port-forward, into the pod", Way::In),
        ("exec, a command's output", Way::Command),
    ] {
        let (mut times, mut cpu) = ([Vec::new(), Vec::new()], [Vec::new(), Vec::new()]);
        for run in 0..=RUNS {
            // In turn, and whoever was first is second in the next run.
            for side in [run % 2, 1 - run % 2] {
                let s = &sides[side];
                let (used, began) = (s.peer.cpu(), Instant::now());
                match way {
                    Way::Out => s.out(flood).await?,
                    Way::In => s.inward(sink).await?,
                    Way::Command => s.command().await?,
                }
                let took = began.elapsed();
                if run > 0 {
                    times[side].push(took);
                    cpu[side].push((s.peer.cpu() - used) * 1e3);
                }
            }
        }
        let mib = MUCH >> 20;
        table.times(&format!("{mib} MiB: {what}"), &times[0], &times[1]);
        table.row(
            &format!("{mib} MiB: {what}: CPU of the daemon"),
            median(&cpu[0]),
            median(&cpu[1]),
            "ms",
        );
    }
    for s in &sides {
        s.peer.cri.remove_pod(&s.pod).await?;
    }
    Ok(())
}

impl Side<'_> {
    async fn begin<'a>(lab: &Lab, peer: &'a Peer, name: &str) -> Result<Side<'a>> {
        let config = pod_config(name, lab, true);
        let pod = peer.cri.run_pod(config.clone()).await?;
        let container = container_config("main", BUSYBOX, &["sleep", "100000"]);
        let container = peer.cri.run(&pod, container, config).await?;
        Ok(Side { peer, pod, container })
    }

    async fn forward(&self) -> Result<Spdy> {
        let request = v1::PortForwardRequest {
            pod_sandbox_id: self.pod.clone(),
            port: vec![],
        };
        let mut runtime = self.peer.cri.runtime.clone();
        Spdy::open(&runtime.port_forward(request).await?.into_inner().url, FORWARD).await
    }

    async fn out(&self, port: u16) -> Result<()> {
        let mut session = self.forward().await?;
        let data = session.forward(port).await?;
        let mut got = 0;
        while got < MUCH {
            match session.next(|_| {}).await?.context("it ended early")? {
                Told::Data { id, count } if id == data => got += count,
                Told::End(id) if id == data => break,
                _ => {}
            }
        }
        ensure!(got == MUCH, "{got} bytes arrived");
        Ok(())
    }

    async fn inward(&self, port: u16) -> Result<()> {
        let mut session = self.forward().await?;
        let data = session.forward(port).await?;
        let chunk = vec![7; CHUNK];
        for _ in 0..MUCH / CHUNK {
            session.send(data, &chunk, false).await?;
        }
        // Not every runtime lets what comes back through once the client has ended its side: it is open still.
        let mut said = Vec::new();
        while said.len() < DONE.len() {
            let told = session.next(|data| said.extend_from_slice(data)).await?;
            told.context("it ended early")?;
        }
        ensure!(said == DONE, "{:?}", String::from_utf8_lossy(&said));
        Ok(())
    }

    async fn command(&self) -> Result<()> {
        let request = v1::ExecRequest {
            container_id: self.container.clone(),
            cmd: ["dd", "if=/dev/zero", "bs=64k", &format!("count={}", MUCH >> 16)]
                .map(str::to_owned)
                .to_vec(),
            stdout: true,
            ..Default::default()
        };
        let mut runtime = self.peer.cri.runtime.clone();
        let url = runtime.exec(request).await?.into_inner().url;
        let mut session = Spdy::open(&url, V4).await?;
        let stdout = session.command(&["stdout"]).await?[1];
        let mut got = 0;
        while got < MUCH {
            match session.next(|_| {}).await?.context("it ended early")? {
                Told::Data { id, count } if id == stdout => got += count,
                Told::End(id) if id == stdout => break,
                _ => {}
            }
        }
        ensure!(got == MUCH, "{got} bytes arrived");
        Ok(())
    }
}

/// Serves each connection in a thread; the port. Ends with the program.
fn serve(each: fn(TcpStream) -> std::io::Result<()>) -> Result<u16> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let port = listener.local_addr()?.port();
    std::thread::spawn(move || {
        for connection in listener.incoming().flatten() {
            std::thread::spawn(move || each(connection));
        }
    });
    Ok(port)
}

fn flood(mut to: TcpStream) -> std::io::Result<()> {
    let zeros = vec![0; 1 << 20];
    (0..MUCH / zeros.len()).try_for_each(|_| to.write_all(&zeros))
}

fn count(mut from: TcpStream) -> std::io::Result<()> {
    let mut buffer = vec![0; 256 << 10];
    let mut left = MUCH;
    while left > 0 {
        match from.read(&mut buffer)? {
            0 => return Ok(()),
            n => left -= n,
        }
    }
    from.write_all(DONE)
}

//! Clients that leave in the middle, ask twice, or speak nonsense; and slipwayd leaving in the middle.

use std::time::Duration;

use anyhow::{Context, Result};
use harness::cri::container_config;
use harness::image::BUSYBOX;
use harness::process::{Holds, Running};
use harness::spdy::{self, Spdy, Told};
use harness::websocket::{V5, WebSocket, request, upgrade};
use harness::{Crictl, Setup, World, v1};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::{SLEEP, SOON, TRANSPORTS, at_rest, processes, shim, until};

async fn exec_url(w: &World, id: &str, command: &[&str], tty: bool) -> Result<String> {
    let request = v1::ExecRequest {
        container_id: id.into(),
        cmd: command.iter().map(|s| (*s).to_owned()).collect(),
        tty,
        stdin: true,
        stdout: true,
        stderr: !tty,
    };
    Ok(w.cri.runtime.clone().exec(request).await?.into_inner().url)
}

#[tokio::test]
async fn a_url_is_good_once_for_its_verb_and_there_are_a_thousand_at_most() -> Result<()> {
    let w = World::new("st-token").await?;
    let (_, id) = w
        .pod_with("token", container_config("token", BUSYBOX, SLEEP))
        .await?;
    let url = exec_url(&w, &id, &["echo", "x"], false).await?;
    let mut session = WebSocket::open(&url).await?;
    while session.next().await?.is_some() {}
    for wrong in [
        url.clone(),
        exec_url(&w, &id, &["true"], false)
            .await?
            .replace("/exec/", "/attach/"),
        format!(
            "{}/AAAAAAAAAAAAAAAAAAAAAA",
            url.rsplit_once('/').expect("a path").0
        ),
    ] {
        assert_eq!(request(&wrong, &upgrade(V5)).await?.0, 404, "{wrong}");
    }
    assert_eq!(
        request(&exec_url(&w, &id, &["true"], false).await?, &[]).await?.0,
        426
    );

    let mut given = 0;
    let refused = loop {
        match exec_url(&w, &id, &["true"], false).await {
            Ok(_) => given += 1,
            Err(error) => break error,
        }
        assert!(given <= 1000);
    };
    assert_eq!(given, 1000);
    let status = refused.downcast_ref::<tonic::Status>().expect("a status");
    assert_eq!(status.code(), tonic::Code::ResourceExhausted);
    w.finish().await
}

#[tokio::test]
async fn nonsense_ends_its_connection_and_nothing_else() -> Result<()> {
    let w = World::new("st-nonsense").await?;
    let (_, id) = w
        .pod_with("nonsense", container_config("nonsense", BUSYBOX, SLEEP))
        .await?;
    let before = at_rest(&w, &id).await?;
    let mut other = WebSocket::open(&exec_url(&w, &id, &["cat"], false).await?).await?;
    for (what, bytes) in [
        ("an unmasked frame", &[0x82, 1, 0][..]),
        ("reserved bits", &[0xf2, 0x80, 0, 0, 0, 0]),
        (
            "a length without bounds",
            &[
                0x82, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0,
            ],
        ),
        ("a channel that is not there", &[0x82, 0x81, 0, 0, 0, 0, 200]),
        ("noise", &[0x5a; 4096]),
    ] {
        let mut session = WebSocket::open(&exec_url(&w, &id, &["cat"], false).await?).await?;
        session.0.write_all(bytes).await?;
        let mut rest = Vec::new();
        let ended = tokio::time::timeout(SOON, session.0.read_to_end(&mut rest)).await;
        assert!(ended.is_ok(), "{what}: the connection stays open");
        assert!(rest.contains(&0x88), "{what}: no close frame in {rest:?}");
    }
    let spdy = [
        ("Connection", "Upgrade"),
        ("Upgrade", "SPDY/3.1"),
        ("X-Stream-Protocol-Version", "v4.channel.k8s.io"),
    ];
    let (status, mut stream) = request(&exec_url(&w, &id, &["cat"], false).await?, &spdy).await?;
    assert_eq!(status, 101);
    stream.write_all(&[0x80, 2, 0, 1, 0, 0, 0, 4, 0, 0, 0, 1]).await?;
    let mut rest = Vec::new();
    tokio::time::timeout(SOON, stream.read_to_end(&mut rest)).await??;
    assert!(
        rest.windows(4).any(|w| w == [0x80, 3, 0, 7]),
        "no GOAWAY in {rest:?}"
    );

    // A neighbour has noticed nothing.
    other.send(0, b"still here").await?;
    while let Some((channel, data)) = other.next().await? {
        if channel == 1 && !data.is_empty() {
            assert_eq!(data, b"still here");
            break;
        }
    }
    drop(other);
    until("the commands are gone", async || {
        Ok(processes(&w, &id).await? == before)
    })
    .await?;
    w.finish().await
}

/// One session of a client that leaves in the middle, at a place that depends on `n`: every other one over SPDY.
async fn abort(w: &World, id: &str, n: usize) -> Result<()> {
    // URLs that are not used are a thousand at most, for a minute.
    let (n, odd) = (n / 2, n % 2 == 1);
    let kind = if n < 1000 { n % 7 } else { 2 + n % 5 };
    if odd {
        return abort_spdy(w, id, kind).await;
    }
    match kind {
        // It never comes, or not to the end of its request.
        0 => drop(exec_url(w, id, &["sleep", "3000"], false).await?),
        1 => {
            let url = exec_url(w, id, &["sleep", "3000"], false).await?;
            let host = url
                .trim_start_matches("http://")
                .split('/')
                .next()
                .unwrap_or_default();
            let mut stream = tokio::net::TcpStream::connect(host).await?;
            stream.write_all(b"GET /exec/").await?;
        }
        // It leaves before the command can have begun, and while it runs, alone or with others.
        2 => drop(WebSocket::open(&exec_url(w, id, &["sleep", "3000"], false).await?).await?),
        3 => {
            let script = "echo begun; sleep 3000 & setsid sleep 3000 & sleep 3000";
            let mut session = WebSocket::open(&exec_url(w, id, &["sh", "-c", script], false).await?).await?;
            while !matches!(session.next().await?, Some((1, data)) if !data.is_empty()) {}
        }
        4 => {
            let script = "trap '' HUP; echo begun; sleep 3000 & sleep 3000; echo never";
            let mut session = WebSocket::open(&exec_url(w, id, &["sh", "-c", script], true).await?).await?;
            while !matches!(session.next().await?, Some((1, data)) if !data.is_empty()) {}
        }
        // In the middle of output that it does not read, and of input that nobody reads.
        5 => {
            let mut session = WebSocket::open(&exec_url(w, id, &["yes"], false).await?).await?;
            session.next().await?;
        }
        _ => {
            let mut session = WebSocket::open(&exec_url(w, id, &["sleep", "3000"], false).await?).await?;
            session.send(0, &[0; 60_000]).await?;
            session.send(0, &[0; 60_000]).await?;
        }
    }
    Ok(())
}

const ALL: &[&str] = &["stdin", "stdout", "stderr"];

async fn abort_spdy(w: &World, id: &str, kind: usize) -> Result<()> {
    let open = async |command: &[&str], tty: bool| -> Result<Spdy> {
        Spdy::open(&exec_url(w, id, command, tty).await?, spdy::V4).await
    };
    /// Until it says something on this stream.
    async fn begun(session: &mut Spdy, stdout: u32) -> Result<()> {
        loop {
            match session.next(|_| {}).await?.context("it ended")? {
                Told::Data { id, .. } if id == stdout => return Ok(()),
                _ => {}
            }
        }
    }
    match kind {
        // Before it has opened a stream, or all of them.
        0 => drop(open(&["sleep", "3000"], false).await?),
        1 => {
            open(&["sleep", "3000"], false).await?.command(&["stdin"]).await?;
        }
        // Before the command can have begun, and while it runs, alone or with others.
        2 => {
            open(&["sleep", "3000"], false).await?.command(ALL).await?;
        }
        3 => {
            let script = "echo begun; sleep 3000 & setsid sleep 3000 & sleep 3000";
            let mut session = open(&["sh", "-c", script], false).await?;
            let streams = session.command(ALL).await?;
            begun(&mut session, streams[2]).await?;
        }
        4 => {
            let script = "trap '' HUP; echo begun; sleep 3000 & sleep 3000; echo never";
            let mut session = open(&["sh", "-c", script], true).await?;
            let streams = session.command(&["stdin", "stdout", "resize"]).await?;
            begun(&mut session, streams[2]).await?;
        }
        // In the middle of output that it does not read, and of input that nobody reads.
        5 => {
            let mut session = open(&["yes"], false).await?;
            let streams = session.command(ALL).await?;
            begun(&mut session, streams[2]).await?;
        }
        _ => {
            let mut session = open(&["sleep", "3000"], false).await?;
            let streams = session.command(ALL).await?;
            session.send(streams[1], &[0; 120_000], false).await?;
            // In the middle of a frame.
            session.raw(&[0, 0, 0, 3, 0, 1, 0, 0, 7]).await?;
        }
    }
    Ok(())
}

/// `ABORTED_SESSIONS`: how many other than ten thousand.
#[tokio::test]
async fn thousands_of_aborted_sessions_leave_nothing() -> Result<()> {
    let count = std::env::var("ABORTED_SESSIONS").map_or(Ok(10_000), |n| n.parse::<usize>())?;
    let w = World::new("st-abort").await?;
    let (_, id) = w
        .pod_with("abort", container_config("abort", BUSYBOX, SLEEP))
        .await?;
    let crictl = Crictl::of(&w.daemon);
    let before = at_rest(&w, &id).await?;
    let pids = [w.daemon.pid(), shim(&w)?];
    let all = async |from: usize, to: usize| -> Result<()> {
        for n in (from..to).step_by(16) {
            let batch = (n..to.min(n + 16)).map(|n| abort(&w, &id, n));
            for aborted in futures(batch).await {
                aborted?;
            }
        }
        until("the commands are gone", async || {
            Ok(processes(&w, &id).await? == before)
        })
        .await
    };
    // Whatever is allocated once has been; blocking threads come and go.
    all(0, 320).await?;
    for transport in TRANSPORTS {
        for _ in 0..5 {
            let mut client = Running::start(&mut crictl.command(["exec", "-r", transport, &id, "yes"]))?;
            client.until("y\ny\n", SOON)?;
            client.kill()?;
        }
    }
    until("the commands of crictl are gone", async || {
        Ok(processes(&w, &id).await? == before)
    })
    .await?;
    tokio::time::sleep(Duration::from_secs(4)).await;
    let at_first = [usually(pids[0]).await?, usually(pids[1]).await?];
    let began = std::time::Instant::now();
    all(0, count).await?;
    let took = began.elapsed();
    until("what slipwayd and the shim hold is what they held", async || {
        let now = [Holds::of(pids[0])?, Holds::of(pids[1])?];
        Ok(at_first.iter().zip(&now).all(|(first, now)| {
            now.descriptors <= first.descriptors
                && now.threads <= first.threads
                && now.resident <= first.resident + 2048
        }))
    })
    .await
    .map_err(|e| {
        anyhow::anyhow!(
            "{e}: {at_first:?}, now {:?} {:?}",
            Holds::of(pids[0]),
            Holds::of(pids[1])
        )
    })?;
    eprintln!(
        "{count} aborted sessions in {took:?}: {at_first:?}, then {:?} {:?}",
        Holds::of(pids[0])?,
        Holds::of(pids[1])?
    );
    assert_eq!(w.cri.exec(&id, &["echo", "on"], 5).await?.1, "on\n");
    w.finish().await
}

/// What a process that is at rest holds: of several looks, the one with the middle of memory, which comes and goes a little.
async fn usually(pid: u32) -> Result<Holds> {
    let mut looks = Vec::new();
    for _ in 0..7 {
        looks.push(Holds::of(pid)?);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    looks.sort_by_key(|holds| holds.resident);
    Ok(looks[looks.len() / 2])
}

/// All of them, side by side.
async fn futures<F: Future>(all: impl Iterator<Item = F>) -> Vec<F::Output> {
    futures_util::future::join_all(all).await
}

#[tokio::test]
async fn a_command_ends_with_slipwayd_and_its_container_does_not() -> Result<()> {
    let mut w = World::new("st-kill").await?;
    let (_, id) = w
        .pod_with("kill", container_config("kill", BUSYBOX, SLEEP))
        .await?;
    let before = at_rest(&w, &id).await?;
    for kill in [true, false] {
        let crictl = Crictl::of(&w.daemon);
        let script = "echo begun; sleep 3000 & sleep 3000; echo never";
        let mut clients = Vec::new();
        for transport in TRANSPORTS {
            let mut c = crictl.command(["exec", "-i", "-r", transport, &id, "sh", "-c", script]);
            let client = Running::start(&mut c)?;
            client.until("begun", SOON)?;
            clients.push(client);
        }
        // A shell says it before it has started what it runs.
        until("each client's shell and its two are there", async || {
            Ok(processes(&w, &id).await? == before + 6)
        })
        .await?;
        if kill {
            w.daemon.kill9()?;
        } else {
            w.daemon.stop()?;
        }
        for client in &mut clients {
            // crictl takes a SPDY connection that breaks for the end of the session; one that is ended says why.
            let code = client.wait(SOON)?;
            let told = code != 0 && client.stderr().contains("stopping");
            assert!(kill || told, "{code}: {}", client.stderr());
        }
        w.restart(&Setup::default()).await?;
        until("the commands are gone", async || {
            Ok(processes(&w, &id).await? == before)
        })
        .await?;
        let s = w.cri.status(&id).await?;
        assert_eq!(s.state, v1::ContainerState::ContainerRunning as i32);
    }
    w.finish().await
}

//! Exec and attach.

use std::time::{Duration, Instant};

use slipway_stream::Config;

use crate::client::command::{Command, SPDY, WEBSOCKET, Wire};
use crate::client::http;
use crate::client::spdy::Session;
use crate::fake::World;

const ALL: &[&str] = &["stdin", "stdout", "stderr"];
const TERMINAL: &[&str] = &["stdin", "stdout", "resize"];
const BOTH: [Wire; 2] = [SPDY, WEBSOCKET];

#[tokio::test]
async fn a_command_gives_its_output_and_its_exit_code() {
    let world = World::start().await;
    for wire in BOTH {
        let echo = Command::begin(&world.exec(&["echo", "hello", "world"], false), wire, ALL).await;
        let finished = echo.finish().await;
        assert_eq!(
            (finished.stdout.as_str(), finished.stderr.as_str()),
            ("hello world\n", "")
        );
        assert_eq!(finished.code(), 0, "{wire:?}");
        let both = Command::begin(&world.exec(&["both"], false), wire, ALL)
            .await
            .finish()
            .await;
        assert_eq!(
            (both.stdout.as_str(), both.stderr.as_str(), both.code()),
            ("out\n", "err\n", 3)
        );
        let exit = Command::begin(&world.exec(&["exit", "255"], false), wire, ALL)
            .await
            .finish()
            .await;
        assert_eq!(exit.code(), 255);
    }
    world.settled().await;
}

#[tokio::test]
async fn input_goes_through_and_its_end_ends_the_command() {
    let world = World::start().await;
    for wire in BOTH {
        let mut cat = Command::begin(&world.exec(&["cat"], false), wire, ALL).await;
        cat.send("stdin", b"one\n").await;
        cat.expect("stdout", "one\n").await;
        cat.send("stdin", b"two\n").await;
        cat.end("stdin").await;
        let finished = cat.finish().await;
        assert_eq!(
            (finished.stdout.as_str(), finished.code()),
            ("one\ntwo\n", 0),
            "{wire:?}"
        );
    }
    // Version 4 of WebSocket cannot end its input: it leaves.
    let wire = Wire::WebSocket("v4.channel.k8s.io");
    let mut cat = Command::begin(&world.exec(&["cat"], false), wire, ALL).await;
    cat.send("stdin", b"one\n").await;
    cat.expect("stdout", "one\n").await;
    drop(cat);
    world.settled().await;
}

#[tokio::test]
async fn a_terminal_has_one_output_and_tells_its_sizes() {
    let world = World::start().await;
    for wire in BOTH {
        let mut sizes = Command::begin(&world.exec(&["sizes", "2"], true), wire, TERMINAL).await;
        sizes.send("resize", br#"{"Width":80,"#).await;
        sizes.send("resize", b"\"Height\":24}\n").await;
        sizes.expect("stdout", "80x24\n").await;
        sizes.send("resize", b"{\"Width\":132,\"Height\":50}\n").await;
        let finished = sizes.finish().await;
        assert_eq!(
            (finished.stdout.as_str(), finished.code()),
            ("80x24\n132x50\n", 0),
            "{wire:?}"
        );
        let describe = Command::begin(&world.exec(&["describe"], true), wire, TERMINAL)
            .await
            .finish()
            .await;
        assert_eq!(describe.stdout, "tty yes stdin yes stderr no");
    }
    world.settled().await;
}

#[tokio::test]
async fn a_failure_is_told_with_its_causes() {
    let world = World::start().await;
    for wire in BOTH {
        let finished = Command::begin(&world.exec(&["nonsense"], false), wire, ALL)
            .await
            .finish()
            .await;
        let status: serde_json::Value = serde_json::from_str(&finished.status).unwrap();
        assert_eq!(status["status"], "Failure");
        assert_eq!(status["reason"], "InternalError");
        assert_eq!(
            status["message"],
            "cannot exec in container c1: no program \"nonsense\""
        );
        let finished = Command::begin(&world.attach("gone", true), wire, ALL)
            .await
            .finish()
            .await;
        assert!(
            finished
                .status
                .contains("cannot attach to container gone: container gone is not running")
        );
    }
}

#[tokio::test]
async fn versions_before_the_fourth_tell_failures_in_plain_text() {
    let world = World::start().await;
    for version in ["v3.channel.k8s.io", "v2.channel.k8s.io", "channel.k8s.io"] {
        let wire = Wire::Spdy(version);
        let echo = Command::begin(&world.exec(&["echo", "x"], false), wire, ALL)
            .await
            .finish()
            .await;
        assert_eq!(
            (echo.stdout.as_str(), echo.status.as_str()),
            ("x\n", ""),
            "{version}"
        );
        let exit = Command::begin(&world.exec(&["exit", "7"], false), wire, ALL)
            .await
            .finish()
            .await;
        assert_eq!(exit.status, "command terminated with exit code 7");
    }
    // Only the third has a stream for sizes; the others do not wait for it.
    let wire = Wire::Spdy("v2.channel.k8s.io");
    let url = world.exec(&["describe"], true);
    let finished = Command::begin(&url, wire, &["stdin", "stdout"])
        .await
        .finish()
        .await;
    assert_eq!(finished.stdout, "tty yes stdin yes stderr no");
}

#[tokio::test]
async fn attach_connects_until_the_input_ends() {
    let world = World::start().await;
    for wire in BOTH {
        let mut attach = Command::begin(&world.attach("c9", true), wire, ALL).await;
        attach.expect("stdout", "attached to c9\n").await;
        attach.send("stdin", b"typed").await;
        attach.expect("stdout", "typed").await;
        attach.end("stdin").await;
        assert_eq!(attach.finish().await.code(), 0);
    }
    // One that only watches leaves when it likes.
    let mut attach = Command::begin(&world.attach("c9", false), SPDY, &["stdout", "stderr"]).await;
    attach.expect("stdout", "attached to c9\n").await;
    drop(attach);
    world.settled().await;
}

#[tokio::test]
async fn a_command_that_does_not_read_its_input_does_not_hold_up_its_client() {
    let world = World::start().await;
    for wire in BOTH {
        let mut ignore = Command::begin(&world.exec(&["ignore", "300"], false), wire, ALL).await;
        for _ in 0..40 {
            ignore.send("stdin", &vec![0; 100_000]).await;
        }
        assert_eq!(ignore.finish().await.code(), 0);
    }
}

#[tokio::test]
async fn a_stream_nobody_asked_for_is_ended_and_harms_nothing() {
    let world = World::start().await;
    let streams = &["stdin", "stdout", "stderr", "resize"];
    let finished = Command::begin(&world.exec(&["echo", "x"], true), SPDY, streams)
        .await
        .finish()
        .await;
    assert_eq!((finished.stdout.as_str(), finished.code()), ("x\n", 0));
}

#[tokio::test]
async fn the_runtime_learns_that_its_client_has_gone() {
    let world = World::start().await;
    for wire in BOTH {
        let waiting = Command::begin(&world.exec(&["wait"], false), wire, ALL).await;
        let stuck = Command::begin(&world.exec(&["stuck"], false), wire, ALL).await;
        while world.running.count() < 2 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        drop((waiting, stuck));
        world.settled().await;
    }
}

#[tokio::test]
async fn a_client_that_opens_too_few_streams_is_sent_away() {
    let config = Config {
        creation_timeout: Duration::from_secs(1),
        ..Config::default()
    };
    let world = World::with(config).await;
    let begun = Instant::now();
    let lame = Command::begin(&world.exec(&["echo", "x"], false), SPDY, &["stdout"]).await;
    let finished = lame.finish().await;
    assert!(
        finished.status.contains("did not open the streams"),
        "{}",
        finished.status
    );
    assert!(begun.elapsed() >= Duration::from_secs(1));
    // Without even an error stream there is nothing to say it on.
    let url = world.exec(&["echo", "x"], false);
    let response = http::spdy(http::connect(&url, None).await, &url, "v4.channel.k8s.io").await;
    let mut session = Session::new(response.io);
    session.until(|session| session.goaway.is_some()).await;
    assert_eq!(session.goaway, Some(0));
    drop(session);
    world.settled().await;
}

#[tokio::test]
async fn an_idle_session_ends_and_one_that_pings_does_not() {
    let config = Config {
        idle_timeout: Duration::from_secs(2),
        abandon_after: Duration::from_millis(100),
        ..Config::default()
    };
    let world = World::with(config).await;
    let url = world.exec(&["wait"], false);
    let response = http::spdy(http::connect(&url, None).await, &url, "v4.channel.k8s.io").await;
    let mut session = Session::new(response.io);
    for (name, id) in ["error", "stdin", "stdout", "stderr"]
        .iter()
        .zip((1..).step_by(2))
    {
        assert!(session.open(id, &[("streamtype", name)]).await);
    }
    for ping in (1..20).step_by(2) {
        session.writer.numbers(6, &[ping]).await.unwrap();
        session.until(|session| session.pongs.contains(&ping)).await;
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    assert!(session.open && session.goaway.is_none());
    let quiet = Instant::now();
    session.until(|_| false).await;
    assert!(session.goaway == Some(0) && quiet.elapsed() < Duration::from_secs(10));
    drop(session);
    world.settled().await;
}

#[tokio::test]
async fn a_server_that_stops_says_so() {
    let world = World::start().await;
    let spdy = Command::begin(&world.exec(&["wait"], false), SPDY, ALL).await;
    let websocket = Command::begin(&world.exec(&["stuck"], false), WEBSOCKET, ALL).await;
    let (spdy, websocket, ()) = tokio::join!(spdy.finish(), websocket.finish(), world.stop());
    for finished in [spdy, websocket] {
        assert!(
            finished.status.contains("the container runtime is stopping"),
            "{}",
            finished.status
        );
    }
}

#[tokio::test]
async fn what_a_websocket_client_sends_along_with_its_request_is_not_lost() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let world = World::start().await;
    let url = world.exec(&["cat"], false);
    let (_, authority, path) = http::split(&url);
    let mut stream = tokio::net::TcpStream::connect(authority).await.unwrap();
    let mut bytes = format!(
        "GET /{path} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
         Sec-WebSocket-Protocol: v5.channel.k8s.io\r\n\r\n"
    )
    .into_bytes();
    // "early" on stdin, and its end.
    bytes.extend([0x82, 0x86, 0, 0, 0, 0, 0]);
    bytes.extend(b"early");
    bytes.extend([0x82, 0x82, 0, 0, 0, 0, 255, 0]);
    stream.write_all(&bytes).await.unwrap();
    let mut answer = Vec::new();
    tokio::time::timeout(Duration::from_secs(5), stream.read_to_end(&mut answer))
        .await
        .expect("the session hangs")
        .unwrap();
    assert!(
        answer.windows(6).any(|window| window == b"\x01early"),
        "{}",
        String::from_utf8_lossy(&answer)
    );
    world.settled().await;
}

//! What clients do that they should not.

use std::time::{Duration, Instant};

use slipway_stream::Config;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::client::command::{Command, SPDY};
use crate::client::spdy::Session;
use crate::client::websocket::{self, Message};
use crate::client::{http, spdy};
use crate::fake::World;

const SPDY_HEADERS: [(&str, &str); 3] = [
    ("Connection", "Upgrade"),
    ("Upgrade", "SPDY/3.1"),
    ("X-Stream-Protocol-Version", "v4.channel.k8s.io"),
];

#[tokio::test]
async fn a_token_is_good_once_and_for_its_verb() {
    let world = World::start().await;
    let url = world.exec(&["echo", "x"], false);
    Command::begin(&url, SPDY, &["stdin", "stdout", "stderr"])
        .await
        .finish()
        .await;
    let again = http::request(&url, "POST", &SPDY_HEADERS).await;
    assert_eq!(again.status, 404);
    assert!(
        again
            .body()
            .await
            .contains("its URL is wrong, was used, or has expired")
    );
    let url = world.exec(&["echo", "x"], false);
    let wrong_verb = url.replace("/exec/", "/attach/");
    assert_eq!(
        http::request(&wrong_verb, "POST", &SPDY_HEADERS).await.status,
        404
    );
    assert_eq!(
        http::request(&url, "POST", &SPDY_HEADERS).await.status,
        404,
        "used up by the wrong verb"
    );
    let (prefix, token) = url.rsplit_once('/').unwrap();
    for guess in [
        "",
        "/",
        &"A".repeat(22),
        &token[1..],
        &format!("{token}/x"),
        "..%2f",
        &"A".repeat(20_000),
    ] {
        let response = http::request(&format!("{prefix}/{guess}"), "POST", &SPDY_HEADERS).await;
        assert_eq!(response.status, 404, "{guess:?}");
    }
    world.settled().await;
}

#[tokio::test]
async fn an_expired_token_is_no_token() {
    let world = World::with(Config {
        token_lifetime: Duration::from_millis(50),
        ..Config::default()
    })
    .await;
    let url = world.exec(&["echo", "x"], false);
    tokio::time::sleep(Duration::from_millis(60)).await;
    assert_eq!(http::request(&url, "POST", &SPDY_HEADERS).await.status, 404);
}

#[tokio::test]
async fn requests_that_are_no_upgrades_are_answered_and_closed() {
    let world = World::start().await;
    let exec = || world.exec(&["echo", "x"], false);
    let upgrade = ("Connection", "Upgrade");
    assert_eq!(http::request(&exec(), "GET", &[]).await.status, 426);
    assert_eq!(http::request(&exec(), "DELETE", &SPDY_HEADERS).await.status, 405);
    assert_eq!(
        http::request(&exec(), "POST", &[upgrade, ("Upgrade", "h2c")])
            .await
            .status,
        426
    );
    assert_eq!(
        http::request(&exec(), "POST", &[upgrade, ("Upgrade", "SPDY/3.1")])
            .await
            .status,
        400
    );
    let unknown = [
        upgrade,
        ("Upgrade", "SPDY/3.1"),
        ("X-Stream-Protocol-Version", "v6.channel.k8s.io"),
    ];
    let refused = http::request(&exec(), "POST", &unknown).await;
    assert_eq!((refused.status, refused.header("connection")), (403, "close"));
    assert!(refused.head.contains("v4.channel.k8s.io") && refused.head.contains("v2.channel.k8s.io"));
    let url = exec();
    let websocket = http::websocket(http::connect(&url, None).await, &url, "binary.k8s.io").await;
    assert_eq!(websocket.status, 400);
    assert!(websocket.body().await.contains("v5.channel.k8s.io"));
    let url = world.port_forward();
    let spdy = http::spdy(http::connect(&url, None).await, &url, "v4.channel.k8s.io").await;
    assert_eq!(spdy.status, 403);
    world.settled().await;
}

#[tokio::test]
async fn what_is_not_http_or_too_much_of_it_is_cut_off() {
    let world = World::start().await;
    let url = world.exec(&["echo", "x"], false);
    let (_, authority, path) = http::split(&url);
    let huge = format!(
        "GET /{path} HTTP/1.1\r\nHost: x\r\nX: {}\r\n\r\n",
        "y".repeat(1 << 20)
    );
    let many = format!("GET /{path} HTTP/1.1\r\n{}\r\n", "A: b\r\n".repeat(1000));
    for (bytes, expected) in [
        // What is not HTTP may be cut off without a word.
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03".to_vec(), None),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(), None),
        (huge.into_bytes(), Some("HTTP/1.1 431 ")),
        (many.into_bytes(), Some("HTTP/1.1 431 ")),
        (vec![0; 100_000], Some("HTTP/1.1 400 ")),
    ] {
        let stream = TcpStream::connect(authority).await.unwrap();
        let (mut read, mut write) = stream.into_split();
        // It may hang up before it has read it all, and what comes after would take its answer along.
        let writing = tokio::spawn(async move {
            let _ = write.write_all(&bytes).await;
            let _ = write.shutdown().await;
        });
        let mut answer = Vec::new();
        let _ = read.read_to_end(&mut answer).await;
        writing.await.unwrap();
        let answer = String::from_utf8_lossy(&answer);
        match expected {
            Some(expected) => assert!(answer.starts_with(expected), "{expected}: {answer:?}"),
            None => assert!(
                answer.is_empty() || answer.starts_with("HTTP/1.1 4"),
                "{answer:?}"
            ),
        }
    }
    world.settled().await;
}

#[tokio::test]
async fn a_request_that_dribbles_in_is_cut_off_in_time() {
    let world = World::with(Config {
        request_timeout: Duration::from_millis(300),
        ..Config::default()
    })
    .await;
    let url = world.exec(&["echo", "x"], false);
    let (_, authority, path) = http::split(&url);
    let mut stream = TcpStream::connect(authority).await.unwrap();
    stream
        .write_all(format!("GET /{path} HTTP/1.1\r\n").as_bytes())
        .await
        .unwrap();
    let dribble = async {
        // Until it is told to stop, or the connection breaks.
        while stream.write_all(b"A: b\r\n").await.is_ok() {
            let mut answer = [0; 512];
            let read = tokio::time::timeout(Duration::from_millis(50), stream.read(&mut answer)).await;
            if let Ok(Ok(0) | Err(_)) = read {
                break;
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(5), dribble)
        .await
        .expect("the server waits for the rest");
    world.settled().await;
    // Its token was never redeemed: whoever it belongs to can use it still.
    let all = &["stdin", "stdout", "stderr"];
    assert_eq!(Command::begin(&url, SPDY, all).await.finish().await.stdout, "x\n");
}

/// A SPDY connection whose streams are not open yet.
async fn upgraded(world: &World) -> Session {
    let url = world.exec(&["cat"], false);
    let response = http::spdy(http::connect(&url, None).await, &url, "v4.channel.k8s.io").await;
    assert_eq!(response.status, 101);
    Session::new(response.io)
}

#[tokio::test]
async fn malformed_spdy_is_answered_with_goaway_and_the_connection_closed() {
    let world = World::start().await;
    let mut bomb = flate2::Compress::new(flate2::Compression::best(), true);
    let mut block = Vec::with_capacity(64 << 10);
    bomb.compress_vec(&vec![0; 8 << 20], &mut block, flate2::FlushCompress::Sync)
        .unwrap();
    assert!(block.len() < 16 << 10);
    let bomb = [
        &[0x80, 3, 0, 1, 0, 0][..],
        &((10 + block.len()) as u16).to_be_bytes(),
        &[0, 0, 0, 1, 0, 0, 0, 0, 0, 0],
        &block,
    ]
    .concat();
    let cases: [(&str, &[u8]); 6] = [
        ("another version", &[0x80, 2, 0, 6, 0, 0, 0, 4, 0, 0, 0, 1]),
        ("a control frame of 16 MB", &[0x80, 3, 0, 1, 0, 0xff, 0xff, 0xff]),
        (
            "a ping of the wrong size",
            &[0x80, 3, 0, 6, 0, 0, 0, 5, 0, 0, 0, 1, 0],
        ),
        ("data on stream 0", &[0, 0, 0, 0, 0, 0, 0, 1, 0]),
        (
            "headers that are not compressed",
            &[
                0x80, 3, 0, 1, 0, 0, 0, 14, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4,
            ],
        ),
        ("a header bomb", &bomb),
    ];
    for (what, bytes) in cases {
        let mut session = upgraded(&world).await;
        session.writer.raw(bytes).await.unwrap();
        session.until(|session| session.goaway.is_some()).await;
        assert_eq!(session.goaway, Some(1), "{what}");
        session.until(|_| false).await;
        assert!(!session.open);
    }
    world.settled().await;
}

#[tokio::test]
async fn malformed_websocket_is_answered_with_close_and_the_connection_closed() {
    let world = World::start().await;
    let cases: [(&str, &[u8], u16); 6] = [
        ("unmasked", &[0x82, 1, 0], 1002),
        ("reserved bits", &[0xc2, 0x80, 0, 0, 0, 0], 1002),
        ("an unknown opcode", &[0x83, 0x80, 0, 0, 0, 0], 1002),
        (
            "a length of 2^63",
            &[0x82, 0xff, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            1002,
        ),
        ("text", &[0x81, 0x81, 0, 0, 0, 0, b'0'], 1003),
        ("channel 9", &[0x82, 0x81, 0, 0, 0, 0, 9], 1002),
    ];
    for (what, bytes, code) in cases {
        let url = world.exec(&["cat"], false);
        let response = http::websocket(http::connect(&url, None).await, &url, "v5.channel.k8s.io").await;
        let (mut writer, mut reader) = websocket::split(response.io);
        assert_eq!(
            reader.next().await,
            Some(Message::Binary(vec![1])),
            "the session has begun"
        );
        writer.raw(bytes).await.unwrap();
        assert_eq!(reader.next().await, Some(Message::Close(code)), "{what}");
        assert_eq!(reader.next().await, None);
    }
    world.settled().await;
}

#[tokio::test]
async fn a_flood_of_pings_that_are_not_listened_to_stops_at_a_bound() {
    let world = World::start().await;
    let url = world.exec(&["cat"], false);
    let response = http::spdy(http::connect(&url, None).await, &url, "v4.channel.k8s.io").await;
    let (mut writer, mut reader) = spdy::split(response.io);
    let pings = [0x80, 3, 0, 6, 0, 0, 0, 4, 0, 0, 0, 1].repeat(10_000);
    let mut sent = 0;
    while tokio::time::timeout(Duration::from_millis(500), writer.raw(&pings))
        .await
        .is_ok()
    {
        sent += pings.len();
        // The server's bound and the kernel's buffers.
        assert!(sent < 32 << 20, "the server takes pings without end");
    }
    // Whoever listens again gets all the answers.
    let mut pongs = 0;
    while pongs < 10_000 {
        pongs += usize::from(matches!(reader.next().await, Some(spdy::Frame::Ping(1))));
    }
    drop((writer, reader));
    world.settled().await;
}

#[tokio::test]
async fn a_client_that_takes_nothing_is_sent_away_and_one_that_is_silent_is_not() {
    let stalled = Duration::from_secs(1);
    let world = World::with(Config {
        stalled_timeout: stalled,
        ..Config::default()
    })
    .await;
    let all = ["error", "stdin", "stdout", "stderr"];
    let open = async |command: &[&str]| {
        let url = world.exec(command, false);
        let response = http::spdy(http::connect(&url, None).await, &url, "v4.channel.k8s.io").await;
        let mut session = Session::new(response.io);
        for (name, id) in all.iter().zip((1..).step_by(2)) {
            assert!(session.open(id, &[("streamtype", name)]).await);
        }
        session
    };
    let mut silent = open(&["cat"]).await;
    let endless = ["flood", "1000000000"];
    let ended = async || {
        let begun = Instant::now();
        while world.running.count() > 1 {
            assert!(begun.elapsed() < Duration::from_secs(30), "it is never sent away");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert!(begun.elapsed() >= stalled / 2);
    };

    let mut deaf = open(&endless).await;
    ended().await;
    deaf.until(|session| session.goaway.is_some()).await;
    assert_eq!((deaf.streams[&5].reset, deaf.goaway), (Some(5), Some(0)));
    deaf.until(|_| false).await;
    assert!(!deaf.open);

    let url = world.exec(&endless, false);
    let response = http::websocket(http::connect(&url, None).await, &url, "v5.channel.k8s.io").await;
    let (_writer, mut reader) = websocket::split(response.io);
    while world.running.count() < 2 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    ended().await;
    let mut last = None;
    while let Some(message) = reader.next().await {
        last = Some(message);
    }
    assert_eq!(last, Some(Message::Close(1008)));

    silent.writer.data(3, true, b"still here").await.unwrap();
    assert_eq!(silent.finished(5).await.data, b"still here");
    drop((silent, deaf));
    world.settled().await;
}

#[tokio::test]
async fn connections_beyond_the_limit_wait_for_their_turn() {
    let world = World::with(Config {
        max_connections: 2,
        abandon_after: Duration::from_millis(100),
        ..Config::default()
    })
    .await;
    let all = &["stdin", "stdout", "stderr"];
    let first = Command::begin(&world.exec(&["wait"], false), SPDY, all).await;
    let second = Command::begin(&world.exec(&["wait"], false), SPDY, all).await;
    let url = world.exec(&["echo", "x"], false);
    let mut third = Box::pin(Command::begin(&url, SPDY, all));
    assert!(
        tokio::time::timeout(Duration::from_millis(300), &mut third)
            .await
            .is_err()
    );
    drop(first);
    assert_eq!(third.await.finish().await.stdout, "x\n");
    drop(second);
    world.settled().await;
}

#[tokio::test]
async fn connections_without_a_url_keep_no_session_out() {
    let world = World::with(Config {
        max_connections: 2,
        abandon_after: Duration::from_millis(100),
        ..Config::default()
    })
    .await;
    let all = &["stdin", "stdout", "stderr"];
    let url = world.exec(&["echo", "x"], false);
    let (_, authority, _) = http::split(&url);
    let mut silent = Vec::new();
    for _ in 0..700 {
        silent.push(TcpStream::connect(authority).await.unwrap());
    }
    let begun = Command::begin(&url, SPDY, all);
    let begun = tokio::time::timeout(Duration::from_secs(5), begun)
        .await
        .expect("there is room");
    assert_eq!(begun.finish().await.stdout, "x\n");
    drop(silent);

    // Sessions have theirs: who finds none waits, and is told.
    let first = Command::begin(&world.exec(&["wait"], false), SPDY, all).await;
    let second = Command::begin(&world.exec(&["wait"], false), SPDY, all).await;
    let refused = http::request(&world.exec(&["echo", "y"], false), "POST", &SPDY_HEADERS).await;
    assert_eq!(refused.status, 503);
    drop((first, second));
    world.settled().await;
}

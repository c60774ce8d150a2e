//! Port-forward.

use std::net::Ipv4Addr;
use std::time::Duration;

use slipway_stream::Config;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;

use crate::client::spdy::Session;
use crate::client::{http, websocket};
use crate::fake::World;

/// Something in a "pod" that says its port and then echoes what it gets in upper case, until it has got it all.
async fn listen() -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                stream.write_all(format!("{port}:").as_bytes()).await.unwrap();
                let mut chunk = [0; 4096];
                while let Ok(count @ 1..) = stream.read(&mut chunk).await {
                    chunk[..count].make_ascii_uppercase();
                    stream.write_all(&chunk[..count]).await.unwrap();
                }
                let _ = stream.write_all(b".").await;
            });
        }
    });
    port
}

async fn begin(world: &World, tunnel: bool) -> Session {
    let url = world.port_forward();
    let io = http::connect(&url, None).await;
    if tunnel {
        let response = http::websocket(io, &url, "SPDY/3.1+portforward.k8s.io").await;
        assert_eq!(response.status, 101, "{}", response.head);
        return Session::new(Box::new(websocket::tunnel(response.io)));
    }
    let response = http::spdy(io, &url, "portforward.k8s.io").await;
    assert_eq!(response.status, 101, "{}", response.head);
    Session::new(response.io)
}

/// Opens a pair: the error stream is `id`, the data stream the next.
async fn open(session: &mut Session, id: u32, port: u16) {
    let (port, request) = (port.to_string(), id.to_string());
    for (kind, id) in [("error", id), ("data", id + 2)] {
        let headers = [
            ("streamtype", kind),
            ("port", port.as_str()),
            ("requestid", request.as_str()),
        ];
        assert!(session.open(id, &headers).await);
    }
    session.writer.data(id, true, b"").await.unwrap();
}

#[tokio::test]
async fn connections_are_forwarded_with_half_close() {
    let world = World::start().await;
    let port = listen().await;
    for tunnel in [false, true] {
        let mut session = begin(&world, tunnel).await;
        open(&mut session, 1, port).await;
        session.writer.data(3, false, b"hello ").await.unwrap();
        session.writer.data(3, true, b"pod").await.unwrap();
        assert_eq!(
            session.finished(3).await.data,
            format!("{port}:HELLO POD.").into_bytes()
        );
        let error = session.finished(1).await;
        assert_eq!((error.data.len(), error.finished), (0, true));
        drop(session);
    }
    world.settled().await;
}

#[tokio::test]
async fn many_connections_share_a_session() {
    let world = World::start().await;
    let ports = [listen().await, listen().await];
    let mut session = begin(&world, false).await;
    for pair in 0..60u32 {
        open(&mut session, 1 + 4 * pair, ports[pair as usize % 2]).await;
    }
    for pair in (0..60u32).rev() {
        let text = format!("number {pair}");
        session
            .writer
            .data(3 + 4 * pair, true, text.as_bytes())
            .await
            .unwrap();
    }
    for pair in 0..60u32 {
        let expected = format!("{}:NUMBER {pair}.", ports[pair as usize % 2]);
        assert_eq!(session.finished(3 + 4 * pair).await.data, expected.into_bytes());
    }
    assert_eq!(world.urls.connections(), 1);
    drop(session);
    world.settled().await;
}

#[tokio::test]
async fn a_port_that_refuses_is_told_and_the_session_goes_on() {
    let world = World::start().await;
    let closed = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
        .await
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let port = listen().await;
    for tunnel in [false, true] {
        let mut session = begin(&world, tunnel).await;
        open(&mut session, 1, closed).await;
        let error = String::from_utf8(session.finished(1).await.data.clone()).unwrap();
        let expected =
            format!("cannot forward to port {closed} of pod p1: nothing listens on port {closed}: ");
        assert!(error.starts_with(&expected), "{error}");
        session.until(|session| session.streams[&3].reset.is_some()).await;
        open(&mut session, 5, port).await;
        session.writer.data(7, true, b"x").await.unwrap();
        assert_eq!(session.finished(7).await.data, format!("{port}:X.").into_bytes());
    }
}

#[tokio::test]
async fn a_stream_that_is_reset_ends_its_connection_alone() {
    let world = World::start().await;
    let port = listen().await;
    let mut session = begin(&world, false).await;
    open(&mut session, 1, port).await;
    open(&mut session, 5, port).await;
    session
        .until(|session| session.streams[&7].data.ends_with(b":"))
        .await;
    assert_eq!(world.running.count(), 2);
    session.writer.numbers(3, &[3, 5]).await.unwrap();
    while world.running.count() > 1 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    session.writer.data(7, true, b"on").await.unwrap();
    assert_eq!(session.finished(7).await.data, format!("{port}:ON.").into_bytes());
}

#[tokio::test]
async fn streams_that_make_no_pair_are_refused() {
    let config = Config {
        creation_timeout: Duration::from_secs(1),
        ..Config::default()
    };
    let world = World::with(config).await;
    let mut session = begin(&world, false).await;
    for (id, headers) in [
        (1, &[("streamtype", "data")][..]),
        (3, &[("streamtype", "data"), ("port", "0")]),
        (5, &[("streamtype", "data"), ("port", "99999")]),
        (7, &[("streamtype", "stdin"), ("port", "80")]),
        (9, &[("port", "80")]),
    ] {
        assert!(!session.open(id, headers).await, "{headers:?}");
        assert_eq!(session.streams[&id].reset, Some(1));
    }
    let headers = [("streamtype", "error"), ("port", "80"), ("requestid", "7")];
    assert!(session.open(11, &headers).await);
    assert!(!session.open(13, &headers).await, "a second error stream");
    assert_eq!(
        session.finished(11).await.data,
        b"the data stream was not opened in time"
    );
    // A data stream is taken before its error stream is there, and given up when that does not come.
    assert!(
        session
            .open(15, &[("streamtype", "data"), ("port", "80"), ("requestid", "8")])
            .await
    );
    assert_eq!(session.finished(15).await.reset, Some(5), "not in time");
}

#[tokio::test]
async fn a_client_without_request_ids_is_understood() {
    let world = World::start().await;
    let port = listen().await;
    let mut session = begin(&world, false).await;
    for pair in 0..3u32 {
        let port = port.to_string();
        assert!(
            session
                .open(4 * pair + 1, &[("streamtype", "error"), ("port", &port)])
                .await
        );
        assert!(
            session
                .open(4 * pair + 3, &[("streamtype", "data"), ("port", &port)])
                .await
        );
        session.writer.data(4 * pair + 3, true, b"old").await.unwrap();
        assert_eq!(
            session.finished(4 * pair + 3).await.data,
            format!("{port}:OLD.").into_bytes()
        );
    }
}

#[tokio::test]
async fn no_more_than_so_many_connections_are_forwarded_at_once() {
    let world = World::start().await;
    let port = listen().await;
    let mut session = begin(&world, false).await;
    for pair in 0..256u32 {
        open(&mut session, 1 + 4 * pair, port).await;
    }
    let headers = [("streamtype", "error"), ("port", "80"), ("requestid", "x")];
    assert!(!session.open(1025, &headers).await);
    assert_eq!(session.streams[&1025].reset, Some(3));
    drop(session);
    world.settled().await;
}

//! Much data and many sessions, with memory, tasks and descriptors counted: in a process of its own, one test at a time.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used)]
// The client is shared with other tests, which use what these do not.
#![allow(dead_code)]

#[path = "../stream/client/mod.rs"]
mod client;
#[path = "../stream/fake.rs"]
mod fake;

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Mutex;

use client::command::{Command, SPDY, WEBSOCKET};
use client::spdy::{self, Frame, Session};
use client::websocket::{self, Message};
use client::{http, http::Io};
use fake::{World, block, pattern};

/// 200 MB, and not a round number of anything.
const TOTAL: usize = 200_000_123;
/// What the process may grow by, client and all.
const GROWTH: usize = 16 << 20;

static ALONE: Mutex<()> = Mutex::const_new(());

/// The memory of the process that is not a file's, in bytes.
fn memory() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"))
        .unwrap();
    line.trim().trim_end_matches(" kB").parse::<usize>().unwrap() << 10
}

/// Watches the memory from now on.
struct Watch {
    before: usize,
    peak: Arc<AtomicUsize>,
    thread: std::thread::JoinHandle<()>,
}

impl Watch {
    fn begin() -> Watch {
        let before = memory();
        let peak = Arc::new(AtomicUsize::new(before));
        let watched = Arc::downgrade(&peak);
        let thread = std::thread::spawn(move || {
            while let Some(peak) = watched.upgrade() {
                peak.fetch_max(memory(), Ordering::Relaxed);
                drop(peak);
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        Watch { before, peak, thread }
    }

    /// By how much it had grown at most.
    fn end(self) -> usize {
        let grown = self.peak.load(Ordering::Relaxed) - self.before;
        drop(self.peak);
        self.thread.join().unwrap();
        grown
    }
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Does something and checks what it took.
async fn bounded(what: &str, work: impl Future<Output = ()>) {
    let (watch, begun) = (Watch::begin(), std::time::Instant::now());
    work.await;
    let (grown, took) = (watch.end(), begun.elapsed());
    let rate = TOTAL as f64 / 1e6 / took.as_secs_f64();
    eprintln!("{what}: {rate:.0} MB/s, {} KiB more at the peak", grown >> 10);
    assert!(grown < GROWTH, "{what} took {grown} bytes of memory");
}

/// Checks data against the pattern, wherever it is cut.
#[derive(Default)]
struct Check(usize);

impl Check {
    fn take(&mut self, data: &[u8]) {
        if let (Some(first), Some(last)) = (data.first(), data.last()) {
            assert_eq!(*first, pattern(self.0), "at {}", self.0);
            self.0 += data.len();
            assert_eq!(*last, pattern(self.0 - 1), "before {}", self.0);
        }
    }
}

async fn connection(url: &str) -> Box<dyn Io> {
    http::connect(url, None).await
}

/// An exec session over SPDY with error 1, stdin 3, stdout 5 and stderr 7.
async fn spdy_exec(world: &World, command: &[&str]) -> (spdy::Writer, spdy::Reader) {
    let url = world.exec(command, false);
    let response = http::spdy(connection(&url).await, &url, "v4.channel.k8s.io").await;
    assert_eq!(response.status, 101);
    let mut session = Session::new(response.io);
    for (name, id) in ["error", "stdin", "stdout"].iter().zip((1..).step_by(2)) {
        assert!(session.open(id, &[("streamtype", name)]).await);
    }
    session.writer.syn(7, &[("streamtype", "stderr")]).await.unwrap();
    (session.writer, session.reader)
}

async fn websocket_exec(world: &World, command: &[&str]) -> (websocket::Writer, websocket::Reader) {
    let url = world.exec(command, false);
    let response = http::websocket(connection(&url).await, &url, "v5.channel.k8s.io").await;
    assert_eq!(response.status, 101);
    websocket::split(response.io)
}

/// Takes output that comes over SPDY; keeps windows if told to, and otherwise answers pings as Kubernetes' client does.
async fn take_spdy(world: &World, keep_windows: bool) {
    let (mut writer, mut reader) = spdy_exec(world, &["flood", &TOTAL.to_string()]).await;
    let mut check = Check::default();
    let mut stop_at = 50_000_000;
    while let Some(frame) = reader.next().await {
        match frame {
            Frame::Data { id: 5, fin, data } => {
                check.take(&data);
                if keep_windows && !data.is_empty() {
                    writer.numbers(9, &[5, data.len() as u32]).await.unwrap();
                    writer.numbers(9, &[0, data.len() as u32]).await.unwrap();
                }
                if check.0 > stop_at {
                    // A client that is slow for a while.
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    stop_at += 50_000_000;
                }
                if fin {
                    break;
                }
            }
            Frame::Ping(id) if !keep_windows => writer.numbers(6, &[id]).await.unwrap(),
            _ => {}
        }
    }
    assert_eq!(check.0, TOTAL);
}

async fn take_websocket(world: &World) {
    let (_writer, mut reader) = websocket_exec(world, &["flood", &TOTAL.to_string()]).await;
    let mut check = Check::default();
    while let Some(message) = reader.next().await {
        match message {
            Message::Binary(message) if message[0] == 1 => check.take(&message[1..]),
            Message::Close(code) => assert_eq!(code, 1000),
            _ => {}
        }
    }
    assert_eq!(check.0, TOTAL);
}

async fn give_spdy(world: &World) {
    let (mut writer, mut reader) = spdy_exec(world, &["sink"]).await;
    let giver = tokio::spawn(async move {
        let mut at = 0;
        while at < TOTAL {
            let count = (64 << 10).min(TOTAL - at);
            writer.data(3, false, &block(at)[..count]).await.unwrap();
            at += count;
        }
        writer.data(3, true, b"").await.unwrap();
        writer
    });
    let mut said = Vec::new();
    while let Some(frame) = reader.next().await {
        match frame {
            Frame::Data { id: 5, data, .. } => said.extend(data),
            Frame::GoAway { .. } => break,
            _ => {}
        }
    }
    assert_eq!(
        String::from_utf8(said).unwrap(),
        format!("{TOTAL} bytes, 0 wrong")
    );
    drop(giver.await.unwrap());
}

async fn give_websocket(world: &World) {
    let (mut writer, mut reader) = websocket_exec(world, &["sink"]).await;
    let giver = tokio::spawn(async move {
        let mut at = 0;
        while at < TOTAL {
            let count = (64 << 10).min(TOTAL - at);
            writer.channel(0, &block(at)[..count]).await.unwrap();
            at += count;
        }
        writer.channel(255, &[0]).await.unwrap();
        writer
    });
    let mut said = Vec::new();
    while let Some(message) = reader.next().await {
        match message {
            Message::Binary(message) if message[0] == 1 => said.extend_from_slice(&message[1..]),
            _ => {}
        }
    }
    assert_eq!(
        String::from_utf8(said).unwrap(),
        format!("{TOTAL} bytes, 0 wrong")
    );
    drop(giver.await.unwrap());
}

/// A "pod" that echoes all it gets.
async fn echo() -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut read, mut write) = stream.split();
                let _ = tokio::io::copy(&mut read, &mut write).await;
            });
        }
    });
    port
}

/// Sends all of it through a forwarded connection and back.
async fn forward(world: &World, tunnel: bool) {
    let port = echo().await.to_string();
    let url = world.port_forward();
    let io = connection(&url).await;
    let io: Box<dyn Io> = if tunnel {
        let response = http::websocket(io, &url, "SPDY/3.1+portforward.k8s.io").await;
        Box::new(websocket::tunnel(response.io))
    } else {
        http::spdy(io, &url, "portforward.k8s.io").await.io
    };
    let mut session = Session::new(io);
    for (kind, id) in [("error", 1), ("data", 3)] {
        assert!(
            session
                .open(id, &[("streamtype", kind), ("port", &port), ("requestid", "0")])
                .await
        );
    }
    let Session {
        mut writer,
        mut reader,
        ..
    } = session;
    let (pongs, mut asked) = tokio::sync::mpsc::channel(8);
    let giver = tokio::spawn(async move {
        let mut at = 0;
        while at < TOTAL {
            let count = (64 << 10).min(TOTAL - at);
            writer.data(3, false, &block(at)[..count]).await.unwrap();
            if let Ok(id) = asked.try_recv() {
                writer.numbers(6, &[id]).await.unwrap();
            }
            at += count;
        }
        writer.data(3, true, b"").await.unwrap();
        writer
    });
    let mut check = Check::default();
    while let Some(frame) = reader.next().await {
        match frame {
            Frame::Data { id: 3, data, fin } => {
                check.take(&data);
                if fin {
                    break;
                }
            }
            Frame::Ping(id) => pongs.send(id).await.unwrap(),
            Frame::Data { data, .. } => assert_eq!(String::from_utf8(data).unwrap(), ""),
            _ => {}
        }
    }
    assert_eq!(check.0, TOTAL);
    drop(giver.await.unwrap());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hundred_megabytes_arrive_whole_with_memory_bounded() {
    let _alone = ALONE.lock().await;
    let world = World::start().await;
    bounded("stdout, SPDY", take_spdy(&world, false)).await;
    bounded("stdout, SPDY with windows", take_spdy(&world, true)).await;
    bounded("stdout, WebSocket", take_websocket(&world)).await;
    bounded("stdin, SPDY", give_spdy(&world)).await;
    bounded("stdin, WebSocket", give_websocket(&world)).await;
    bounded("port-forward and back, SPDY", forward(&world, false)).await;
    bounded("port-forward and back, tunnel", forward(&world, true)).await;
    world.settled().await;
}

/// Begins something and leaves in the middle of it, each time at another point.
async fn abort(world: &World, kind: usize, port: u16) {
    let all = &["stdin", "stdout", "stderr"];
    match kind % 10 {
        0 => {
            let url = world.exec(&["cat"], false);
            drop(connection(&url).await);
        }
        1 => {
            let url = world.exec(&["cat"], false);
            let (_, authority, _) = http::split(&url);
            let mut stream = TcpStream::connect(authority).await.unwrap();
            stream.write_all(b"POST /exec/").await.unwrap();
        }
        2 => {
            let url = world.exec(&["cat"], false);
            drop(http::spdy(connection(&url).await, &url, "v4.channel.k8s.io").await);
        }
        3 => {
            let url = world.exec(&["cat"], false);
            let response = http::spdy(connection(&url).await, &url, "v4.channel.k8s.io").await;
            let mut session = Session::new(response.io);
            session.open(1, &[("streamtype", "error")]).await;
        }
        4 => drop(Command::begin(&world.exec(&["wait"], false), SPDY, all).await),
        5 => drop(Command::begin(&world.exec(&["stuck"], false), WEBSOCKET, all).await),
        6 => {
            let mut flood = Command::begin(&world.exec(&["flood", "10000000"], false), SPDY, all).await;
            flood.expect("stdout", "").await;
        }
        7 => {
            // Input that nobody takes: the server does not read on when it leaves.
            let (mut writer, _reader) = spdy_exec(world, &["wait"]).await;
            let stuffing = vec![0; 1 << 20];
            let stuff = async { while writer.data(3, false, &stuffing).await.is_ok() {} };
            let _ = tokio::time::timeout(Duration::from_millis(50), stuff).await;
        }
        8 => {
            let (mut writer, mut reader) = websocket_exec(world, &["cat"]).await;
            writer.channel(0, b"half a mess").await.unwrap();
            writer.raw(&[0x82, 0xff, 0, 0]).await.unwrap();
            reader.next().await;
        }
        _ => {
            let url = world.port_forward();
            let response = http::spdy(connection(&url).await, &url, "portforward.k8s.io").await;
            let mut session = Session::new(response.io);
            let port = port.to_string();
            for (kind, id, request) in [
                ("error", 1, "1"),
                ("data", 3, "1"),
                ("data", 5, "5"),
                ("data", 7, "7"),
            ] {
                let headers = [
                    ("streamtype", kind),
                    ("port", port.as_str()),
                    ("requestid", request),
                ];
                assert!(session.open(id, &headers).await);
            }
            session.writer.data(3, false, b"hello").await.unwrap();
        }
    }
}

async fn abort_in_time(world: &World, kind: usize, port: u16) {
    let aborted = tokio::time::timeout(Duration::from_secs(20), abort(world, kind, port)).await;
    assert!(
        aborted.is_ok(),
        "the client hangs before it can leave, in case {}",
        kind % 10
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_thousand_aborted_sessions_leave_nothing() {
    let _alone = ALONE.lock().await;
    let world = World::start().await;
    let port = echo().await;
    for kind in 0..10 {
        abort_in_time(&world, kind, port).await;
    }
    world.settled().await;
    let metrics = tokio::runtime::Handle::current().metrics();
    let (tasks, descriptors_before) = (metrics.num_alive_tasks(), descriptors());
    let watch = Watch::begin();
    for round in 0..40 {
        let batch = (0..50).map(|number| abort_in_time(&world, round + number, port));
        futures_util::future::join_all(batch).await;
        if round % 8 == 7 {
            // The blocked ones are found out within a tick; there is a limit to how many are served at once.
            world.settled().await;
        }
    }
    world.settled().await;
    // The echoing "pods" end when their connections do.
    for _ in 0..200 {
        if metrics.num_alive_tasks() <= tasks && descriptors() <= descriptors_before {
            break;
        }
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
    assert_eq!(
        (metrics.num_alive_tasks(), descriptors()),
        (tasks, descriptors_before)
    );
    let grown = watch.end();
    eprintln!("2000 aborted sessions: {} KiB more at the peak", grown >> 10);
    assert!(grown < 128 << 20, "aborted sessions took {grown} bytes");
    // It works as before.
    let mut cat = Command::begin(&world.exec(&["cat"], false), SPDY, &["stdin", "stdout", "stderr"]).await;
    cat.end("stdin").await;
    assert_eq!(cat.finish().await.code(), 0);
    let mut pod = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.unwrap();
    pod.shutdown().await.unwrap();
    assert_eq!(pod.read(&mut [0]).await.unwrap(), 0);
}

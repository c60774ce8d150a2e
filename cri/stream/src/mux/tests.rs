//! The driver and the ends of streams, over an in-memory connection.

use std::future::pending;
use std::io;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

use super::*;
use crate::noise::Noise;
use crate::spdy::Spdy;
use crate::transport::Transport;
use crate::websocket::{Channel, Channels, Tunnel};

impl Transport for DuplexStream {
    fn hung_up(&self) -> bool {
        false
    }
}

const MINUTE: Duration = Duration::from_secs(60);

fn limits(idle: Duration) -> Limits {
    Limits {
        idle,
        stalled: idle,
        farewell: Duration::from_millis(500),
    }
}

/// One byte for the stream, one for the length, then data; a length of 0 ends the stream, stream 255 says goodbye.
struct Toy;

impl Framing for Toy {
    fn receive(&mut self, input: &mut BytesMut, table: &mut Table) -> Result<Received, Violation> {
        while input.len() >= 2 {
            let (id, length) = (StreamId::from(input[0]), usize::from(input[1]));
            if id == 255 {
                return Ok(Received::Goodbye);
            }
            if input.len() < 2 + length {
                break;
            }
            if table.is_receiving(id).is_none() {
                table.open(id, Headers::default(), Window::default());
            }
            if table.room(id) < length {
                table.block();
                break;
            }
            let frame = input.split_to(2 + length);
            table.deliver(id, &frame[2..]);
            if length == 0 {
                table.finish_receiving(id);
            }
        }
        Ok(Received::Taken)
    }

    fn send(&mut self, id: StreamId, data: &[u8], table: &mut Table) -> usize {
        let count = data.len().min(255);
        table.out.extend_from_slice(&[id as u8, count as u8]);
        table.out.extend_from_slice(&data[..count]);
        count
    }

    fn finish(&mut self, id: StreamId, table: &mut Table) {
        table.out.extend_from_slice(&[id as u8, 0]);
    }

    fn goodbye(&mut self, table: &mut Table) {
        table.out.extend_from_slice(&[255, 0]);
    }
}

fn start(framing: impl Framing + 'static, idle: Duration) -> (DuplexStream, Mux, JoinHandle<Ended>) {
    let (client, server) = duplex(4096);
    let mux = Mux::new(Box::new(framing));
    let driver = Driver::new(server, &mux, &Bytes::new(), limits(idle));
    (client, mux, tokio::spawn(driver.run()))
}

async fn accept(mux: &Mux) -> (Input, Output) {
    let opened = mux.next().await.unwrap();
    mux.accept(opened.id)
}

#[tokio::test]
async fn a_stream_carries_bytes_both_ways_and_ends_each_way_by_itself() {
    let (mut client, mux, _driver) = start(Toy, MINUTE);
    client.write_all(&[7, 3, b'a', b'b', b'c', 7, 0]).await.unwrap();
    let (mut input, mut output) = accept(&mux).await;
    let mut got = String::new();
    input.read_to_string(&mut got).await.unwrap();
    assert_eq!(got, "abc");
    output.write_all(b"xyz").await.unwrap();
    output.shutdown().await.unwrap();
    let mut sent = [0; 7];
    client.read_exact(&mut sent).await.unwrap();
    assert_eq!(&sent, b"\x07\x03xyz\x07\x00");
    let late = output.write(b"more").await.unwrap_err();
    assert_eq!(late.kind(), io::ErrorKind::BrokenPipe);
}

#[tokio::test]
async fn a_client_that_leaves_is_told_from_a_stream_that_ends() {
    let (mut client, mux, driver) = start(Toy, MINUTE);
    client.write_all(&[7, 1, b'a', 8, 1, b'b', 8, 0]).await.unwrap();
    let (mut broken, mut output) = accept(&mux).await;
    let (mut ended, _) = accept(&mux).await;
    assert!(!mux.hangup().has_happened());
    drop(client);
    mux.hangup().wait().await;
    assert!(matches!(driver.await.unwrap(), Ended::Gone | Ended::Broken(_)));
    let mut got = Vec::new();
    let error = broken.read_to_end(&mut got).await.unwrap_err();
    assert_eq!(
        (error.kind(), &got[..]),
        (io::ErrorKind::ConnectionAborted, &b"a"[..])
    );
    ended.read_to_end(&mut got).await.unwrap();
    assert_eq!(got, b"ab");
    assert_eq!(
        output.write(b"x").await.unwrap_err().kind(),
        io::ErrorKind::BrokenPipe
    );
    assert!(mux.next().await.is_none());
}

#[tokio::test]
async fn a_writer_waits_for_a_client_that_does_not_read() {
    let (mut client, mux, _driver) = start(Toy, MINUTE);
    client.write_all(&[7, 0]).await.unwrap();
    let (_input, mut output) = accept(&mux).await;
    let mut written = 0;
    while let Ok(count) = timeout(Duration::from_millis(200), output.write(&[0; 10_000])).await {
        written += count.unwrap();
        assert!(written < 4 * OUT_BUFFER, "nothing holds the writer up");
    }
    let reader = tokio::spawn(async move {
        let mut all = Vec::new();
        client.read_to_end(&mut all).await.unwrap();
        all.len()
    });
    output.write_all(&[0; 10_000]).await.unwrap();
    mux.close();
    assert!(reader.await.unwrap() > written + 10_000);
}

#[tokio::test]
async fn a_stream_that_is_not_read_holds_up_its_client_and_then_lets_it_go_on() {
    let (mut client, mux, _driver) = start(Toy, MINUTE);
    let sender = tokio::spawn(async move {
        for _ in 0..10_000 {
            client.write_all(&[7, 255]).await.unwrap();
            client.write_all(&[1; 255]).await.unwrap();
        }
        client.write_all(&[7, 0]).await.unwrap();
        client
    });
    let (mut input, _output) = accept(&mux).await;
    sleep(Duration::from_millis(200)).await;
    assert!(!sender.is_finished());
    assert!(mux.shared.lock().table.buffered() <= STREAM_BUFFER);
    let mut all = Vec::new();
    input.read_to_end(&mut all).await.unwrap();
    assert_eq!(all.len(), 2_550_000);
    drop(sender.await.unwrap());
}

#[tokio::test]
async fn what_nobody_reads_is_discarded() {
    let (mut client, mux, _driver) = start(Toy, MINUTE);
    client.write_all(&[7, 1, b'a']).await.unwrap();
    let (input, _output) = accept(&mux).await;
    drop(input);
    for _ in 0..5000 {
        client.write_all(&[7, 255]).await.unwrap();
        client.write_all(&[1; 255]).await.unwrap();
    }
    assert_eq!(mux.shared.lock().table.buffered(), 0);
}

#[tokio::test]
async fn a_stream_is_forgotten_when_both_sides_are_done_with_it() {
    let (mut client, mux, _driver) = start(Toy, MINUTE);
    for id in 0..200 {
        client.write_all(&[id, 1, b'a', id, 0]).await.unwrap();
        drop(accept(&mux).await);
    }
    assert_eq!(mux.shared.lock().table.streams.len(), 0);
    client.write_all(&[7, 1, b'a']).await.unwrap();
    let opened = mux.next().await.unwrap();
    mux.refuse(opened.id, Refusal::Refused);
    assert_eq!(mux.shared.lock().table.streams.len(), 0);
}

#[tokio::test]
async fn goodbye_comes_after_everything_else() {
    let (mut client, mux, driver) = start(Toy, MINUTE);
    client.write_all(&[7, 0]).await.unwrap();
    let (_input, mut output) = accept(&mux).await;
    let writer = tokio::spawn(async move {
        output.write_all(&[1; 100_000]).await.unwrap();
        mux.close();
        output
    });
    let mut all = Vec::new();
    client.read_to_end(&mut all).await.unwrap();
    assert!(all.len() > 100_000);
    assert_eq!(all[all.len() - 2..], [255, 0]);
    drop(client);
    drop(writer.await.unwrap());
    assert!(matches!(driver.await.unwrap(), Ended::Finished));
}

#[tokio::test]
async fn a_connection_on_which_nothing_moves_is_ended() {
    let (mut client, mux, driver) = start(Toy, Duration::from_millis(100));
    client.write_all(&[7, 1, b'a']).await.unwrap();
    let (_input, mut output) = accept(&mux).await;
    // A client that sends but takes nothing is ended all the same.
    let stuffed = tokio::spawn(async move { output.write_all(&[0; 1 << 20]).await });
    let talk = async {
        loop {
            if client.write_all(&[7, 1, b'a']).await.is_err() {
                pending::<()>().await;
            }
            sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::select! {
        ended = driver => assert!(matches!(ended.unwrap(), Ended::Stalled)),
        () = talk => {}
    }
    assert!(stuffed.await.unwrap().is_err());
}

/// Random bytes against the whole of it: it ends, and every stream's ends with it.
#[tokio::test]
async fn no_bytes_whatever_keep_a_connection_from_ending() {
    let mut noise = Noise::of(3);
    for round in 0..Noise::rounds(300) {
        let framing: Box<dyn Fn() -> Mux> = match round % 3 {
            0 => Box::new(|| Mux::new(Box::new(Spdy::new()))),
            1 => Box::new(|| Mux::new(Box::new(Channels::new(true, Channel::Stdout)))),
            _ => Box::new(|| Mux::new(Box::new(Tunnel::new()))),
        };
        let (mut client, server) = duplex(4096);
        let mux = framing();
        let driver = Driver::new(server, &mux, &Bytes::new(), limits(MINUTE));
        let session = async {
            while let Some(opened) = mux.next().await {
                drop(mux.accept(opened.id));
            }
        };
        let count = noise.below(2000);
        let mut bytes = noise.bytes(count);
        if round % 3 != 0 && bytes.len() > 2 {
            bytes[..2].copy_from_slice(&[0x82, 0xfe]);
        }
        let chat = async move {
            // The server may hang up in the middle of it.
            let _ = client.write_all(&bytes).await;
            let _ = client.shutdown().await;
            let mut answer = Vec::new();
            let _ = client.read_to_end(&mut answer).await;
        };
        let all = async { tokio::join!(driver.run(), session, chat) };
        timeout(Duration::from_secs(20), all)
            .await
            .expect("the connection ends");
        assert!(mux.hangup().has_happened());
        assert_eq!(mux.shared.lock().table.streams.len(), 0);
    }
}

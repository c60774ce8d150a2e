//! Exec and attach over either transport, for commands that say little.

use std::sync::Arc;

use super::http;
use super::spdy::Session;
use super::websocket::{self, Message, Reader, Writer};

/// How to talk to the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wire {
    Spdy(&'static str),
    WebSocket(&'static str),
}

pub const SPDY: Wire = Wire::Spdy("v4.channel.k8s.io");
pub const WEBSOCKET: Wire = Wire::WebSocket("v5.channel.k8s.io");

/// What came of it.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Finished {
    pub stdout: String,
    pub stderr: String,
    /// What was said on the error stream.
    pub status: String,
}

impl Finished {
    /// The exit code that a status names.
    pub fn code(&self) -> u8 {
        let status: serde_json::Value = serde_json::from_str(&self.status).expect("a status");
        if status["status"] == "Success" {
            return 0;
        }
        assert_eq!(status["reason"], "NonZeroExitCode", "{status}");
        assert_eq!(status["details"]["causes"][0]["reason"], "ExitCode");
        status["details"]["causes"][0]["message"]
            .as_str()
            .unwrap()
            .parse()
            .unwrap()
    }
}

enum Connection {
    Spdy {
        session: Box<Session>,
        ids: Vec<(&'static str, u32)>,
    },
    WebSocket {
        writer: Writer,
        reader: Reader,
        got: [Vec<u8>; 5],
    },
}

pub struct Command(Connection);

const CHANNELS: [&str; 5] = ["stdin", "stdout", "stderr", "error", "resize"];

impl Command {
    /// Begins a session with the named streams beside the error stream.
    pub async fn begin(url: &str, wire: Wire, streams: &[&'static str]) -> Command {
        Command::begin_trusting(url, wire, streams, None).await
    }

    pub async fn begin_trusting(
        url: &str,
        wire: Wire,
        streams: &[&'static str],
        trust: Option<Arc<rustls::ClientConfig>>,
    ) -> Command {
        let io = http::connect(url, trust).await;
        match wire {
            Wire::Spdy(protocol) => {
                let response = http::spdy(io, url, protocol).await;
                assert_eq!(response.status, 101, "{}", response.head);
                assert_eq!(response.header("x-stream-protocol-version"), protocol);
                assert_eq!(response.header("upgrade"), "SPDY/3.1");
                let mut session = Box::new(Session::new(response.io));
                let mut ids = Vec::new();
                for (name, id) in ["error"].iter().chain(streams).zip((1..).step_by(2)) {
                    assert!(
                        session.open(id, &[("streamtype", name)]).await,
                        "{name} was refused"
                    );
                    ids.push((*name, id));
                }
                Command(Connection::Spdy { session, ids })
            }
            Wire::WebSocket(protocol) => {
                let response = http::websocket(io, url, protocol).await;
                assert_eq!(response.status, 101, "{}", response.head);
                assert_eq!(response.header("sec-websocket-protocol"), protocol);
                assert_eq!(
                    response.header("sec-websocket-accept"),
                    "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
                );
                let (writer, reader) = websocket::split(response.io);
                Command(Connection::WebSocket {
                    writer,
                    reader,
                    got: Default::default(),
                })
            }
        }
    }

    pub async fn send(&mut self, stream: &str, data: &[u8]) {
        match &mut self.0 {
            Connection::Spdy { session, ids } => {
                session.writer.data(id(ids, stream), false, data).await.unwrap();
            }
            Connection::WebSocket { writer, .. } => writer.channel(channel(stream), data).await.unwrap(),
        }
    }

    /// Ends a stream of ours.
    pub async fn end(&mut self, stream: &str) {
        match &mut self.0 {
            Connection::Spdy { session, ids } => {
                session.writer.data(id(ids, stream), true, b"").await.unwrap();
            }
            Connection::WebSocket { writer, .. } => writer.channel(255, &[channel(stream)]).await.unwrap(),
        }
    }

    /// Waits until so much has come on a stream.
    pub async fn expect(&mut self, stream: &str, text: &str) {
        loop {
            let got = match &self.0 {
                Connection::Spdy { session, ids } => &session.streams[&id(ids, stream)].data,
                Connection::WebSocket { got, .. } => &got[channel(stream) as usize],
            };
            if got.ends_with(text.as_bytes()) {
                return;
            }
            assert!(self.step().await, "the end, before {text:?}");
        }
    }

    async fn step(&mut self) -> bool {
        match &mut self.0 {
            Connection::Spdy { session, .. } => session.step().await,
            Connection::WebSocket { reader, got, writer } => match reader.next().await {
                Some(Message::Binary(message)) => {
                    got[message[0] as usize].extend(&message[1..]);
                    true
                }
                Some(Message::Close(code)) => {
                    assert_eq!(code, 1000);
                    let _ = writer.frame(0x88, &code.to_be_bytes()).await;
                    true
                }
                Some(_) => true,
                None => false,
            },
        }
    }

    /// Waits for the end that the server makes.
    pub async fn finish(mut self) -> Finished {
        while self.step().await {}
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
        let of = |name: &str| match &self.0 {
            Connection::Spdy { session, ids } => ids
                .iter()
                .find(|(known, _)| *known == name)
                .map(|(_, id)| {
                    let stream = &session.streams[id];
                    assert!(stream.finished, "{name} has no end");
                    text(&stream.data)
                })
                .unwrap_or_default(),
            Connection::WebSocket { got, .. } => text(&got[channel(name) as usize]),
        };
        if let Connection::Spdy { session, .. } = &self.0 {
            assert_eq!(session.goaway, Some(0));
        }
        Finished {
            stdout: of("stdout"),
            stderr: of("stderr"),
            status: of("error"),
        }
    }
}

fn id(ids: &[(&str, u32)], stream: &str) -> u32 {
    ids.iter()
        .find(|(name, _)| *name == stream)
        .expect("an opened stream")
        .1
}

fn channel(stream: &str) -> u8 {
    CHANNELS
        .iter()
        .position(|name| *name == stream)
        .expect("a stream's name") as u8
}

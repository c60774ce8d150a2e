//! Events on their way to containerd: one ttrpc connection of ours to its socket, one event at a time and in order, kept
//! while containerd is away. Knows neither containers nor what the events mean.

use crate::diag::{debug, warning};
use crate::reactor::{Interest, Reactor, Ready, Source, Timer};
use prost::Message;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SendFlags, SocketAddrUnix, SocketFlags, SocketType};
use slipway_shim_api::frame::{self, HEADER, Header, Kind};
use slipway_shim_api::{Any, forward, names, timestamp, ttrpc, types};
use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::Duration;

/// Events kept while containerd does not take them; beyond that the oldest goes.
const KEPT: usize = 1024;
/// Before the first try to connect again; doubled each time.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// The connection and what waits for it.
#[derive(Debug)]
pub struct Publisher {
    address: PathBuf,
    namespace: String,
    socket: Option<OwnedFd>,
    /// `types.Envelope`s, encoded.
    queue: VecDeque<forward::ForwardRequest>,
    output: Vec<u8>,
    input: Vec<u8>,
    stream: u32,
    in_flight: bool,
    pause: Duration,
}

impl Publisher {
    /// To the socket containerd named, in its namespace.
    pub fn new(address: &str, namespace: &str) -> Publisher {
        let path = address.strip_prefix("unix://").unwrap_or(address);
        Publisher {
            address: PathBuf::from(path),
            namespace: namespace.to_owned(),
            socket: None,
            queue: VecDeque::new(),
            output: Vec::new(),
            input: Vec::new(),
            stream: 1,
            in_flight: false,
            pause: FIRST_PAUSE,
        }
    }

    /// Whether everything is delivered.
    pub fn is_idle(&self) -> bool {
        self.queue.is_empty()
    }

    /// Sends an event, or keeps it until that is possible.
    pub fn push(&mut self, reactor: &mut Reactor, topic: &str, type_url: &str, event: Vec<u8>) {
        if self.queue.len() == KEPT {
            warning!("an event for containerd was dropped: {KEPT} wait already");
            // The first is on its way.
            self.queue.remove(usize::from(self.in_flight));
        }
        let envelope = types::Envelope {
            timestamp: Some(timestamp(crate::clock::now())),
            namespace: self.namespace.clone(),
            topic: topic.to_owned(),
            event: Some(Any {
                type_url: type_url.to_owned(),
                value: event,
            }),
        };
        self.queue.push_back(forward::ForwardRequest {
            envelope: Some(envelope),
        });
        if self.socket.is_none() && self.queue.len() == 1 {
            self.connect(reactor);
        } else {
            self.send(reactor);
        }
    }

    /// Connects (again), and sends what waits.
    pub fn connect(&mut self, reactor: &mut Reactor) {
        if self.socket.is_some() || self.queue.is_empty() {
            return;
        }
        let open = || -> Result<OwnedFd, Errno> {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
            rustix::net::connect(&socket, &SocketAddrUnix::new(&self.address)?)?;
            Ok(socket)
        };
        let watched = open().and_then(|socket| {
            reactor
                .watch(&socket, Source::Publisher, Interest::Read)
                .map_err(|_| Errno::NOMEM)
                .map(|_| socket)
        });
        match watched {
            Ok(socket) => {
                self.socket = Some(socket);
                self.pause = FIRST_PAUSE;
                self.send(reactor);
            }
            Err(errno) => {
                debug!("connect to containerd: {errno}");
                self.later(reactor);
            }
        }
    }

    fn later(&mut self, reactor: &mut Reactor) {
        reactor.after(self.pause, Timer::Publisher);
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
    }

    /// The connection has something to read, or room.
    pub fn on_ready(&mut self, reactor: &mut Reactor, ready: Ready) {
        if ready.read && !self.receive() {
            return self.lost(reactor);
        }
        self.send(reactor);
    }

    fn lost(&mut self, reactor: &mut Reactor) {
        if let Some(socket) = self.socket.take() {
            reactor.forget(&socket);
        }
        self.output.clear();
        self.input.clear();
        // Whether it arrived is not known: it is sent again.
        self.in_flight = false;
        if !self.queue.is_empty() {
            self.later(reactor);
        }
    }

    /// Reads answers; false when the connection is of no use any more.
    fn receive(&mut self) -> bool {
        let Some(socket) = &self.socket else { return true };
        let mut some = [0u8; 512];
        loop {
            match rustix::io::read(socket, &mut some) {
                Ok(0) => return false,
                Ok(n) => self.input.extend_from_slice(&some[..n]),
                Err(Errno::AGAIN) => break,
                Err(Errno::INTR) => {}
                Err(_) => return false,
            }
        }
        while let Some(bytes) = self.input.first_chunk::<HEADER>() {
            let Ok(header) = Header::decode(bytes) else {
                return false;
            };
            let end = HEADER + header.length as usize;
            let Some(data) = self.input.get(HEADER..end) else {
                break;
            };
            if header.kind == Kind::Response && header.stream == self.stream && self.in_flight {
                let status = ttrpc::Response::decode(data).ok().and_then(|r| r.status);
                if let Some(status) = status.filter(|s| s.code != 0) {
                    warning!("containerd did not take an event: {}", status.message);
                }
                self.queue.pop_front();
                self.in_flight = false;
                self.stream = self.stream.checked_add(2).unwrap_or(1);
            }
            self.input.drain(..end);
        }
        true
    }

    fn send(&mut self, reactor: &mut Reactor) {
        let Some(socket) = &self.socket else { return };
        while !self.in_flight
            && let Some(event) = self.queue.front()
        {
            let request = ttrpc::Request {
                service: names::EVENTS.to_owned(),
                method: names::FORWARD.to_owned(),
                payload: event.encode_to_vec(),
                ..Default::default()
            };
            match frame::encode(self.stream, Kind::Request, &request) {
                Ok(bytes) => {
                    self.output = bytes;
                    self.in_flight = true;
                }
                // Those behind it are sent all the same.
                Err(e) => {
                    warning!("an event for containerd was dropped: {e}");
                    self.queue.pop_front();
                }
            }
        }
        let had_output = !self.output.is_empty();
        while !self.output.is_empty() {
            match rustix::net::send(socket, &self.output, SendFlags::NOSIGNAL) {
                Ok(n) => drop(self.output.drain(..n)),
                Err(Errno::AGAIN) => break,
                Err(Errno::INTR) => {}
                Err(_) => return self.lost(reactor),
            }
        }
        if had_output {
            let interest = if self.output.is_empty() {
                Interest::Read
            } else {
                Interest::Both
            };
            reactor.change(socket, Source::Publisher, interest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixListener;

    fn answer(server: &mut impl ReadWrite) -> String {
        let mut header = [0; HEADER];
        server.read_exact(&mut header).expect("a header");
        let header = Header::decode(&header).expect("a header");
        let mut data = vec![0; header.length as usize];
        server.read_exact(&mut data).expect("data");
        let request = ttrpc::Request::decode(data.as_slice()).expect("a request");
        let event = forward::ForwardRequest::decode(request.payload.as_slice()).expect("an event");
        let response =
            frame::encode(header.stream, Kind::Response, &ttrpc::Response::default()).expect("short");
        server.write_all(&response).expect("answered");
        let envelope = event.envelope.expect("an envelope");
        assert_eq!(
            (request.method.as_str(), envelope.namespace.as_str()),
            ("Forward", "ns")
        );
        envelope.topic
    }

    trait ReadWrite: Read + Write {}
    impl<T: Read + Write> ReadWrite for T {}

    #[test]
    fn events_arrive_in_order_also_over_a_lost_connection() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("ttrpc.sock");
        let mut reactor = Reactor::new().expect("epoll");
        let mut publisher = Publisher::new(path.to_str().expect("text"), "ns");
        publisher.push(&mut reactor, "/a", "t", vec![1]);
        publisher.push(&mut reactor, "/b", "t", vec![2]);
        assert!(publisher.socket.is_none(), "nobody listens yet");

        let listener = UnixListener::bind(&path).expect("bound");
        publisher.connect(&mut reactor);
        let (mut server, _) = listener.accept().expect("connected");
        assert_eq!(answer(&mut server), "/a");
        publisher.on_ready(
            &mut reactor,
            Ready {
                read: true,
                ..Ready::default()
            },
        );
        drop(server);
        publisher.on_ready(
            &mut reactor,
            Ready {
                read: true,
                ..Ready::default()
            },
        );
        publisher.connect(&mut reactor);
        let (mut server, _) = listener.accept().expect("connected again");
        assert_eq!(answer(&mut server), "/b");
        publisher.on_ready(
            &mut reactor,
            Ready {
                read: true,
                ..Ready::default()
            },
        );
        assert!(publisher.is_idle());
    }

    #[test]
    fn an_event_that_no_frame_holds_keeps_none_behind_it() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("ttrpc.sock");
        let mut reactor = Reactor::new().expect("epoll");
        let mut publisher = Publisher::new(path.to_str().expect("text"), "ns");
        for (topic, length) in [("/a", frame::MAX_DATA), ("/b", frame::MAX_DATA), ("/c", 1)] {
            publisher.push(&mut reactor, topic, "t", vec![0; length]);
        }
        let listener = UnixListener::bind(&path).expect("bound");
        publisher.connect(&mut reactor);
        let (mut server, _) = listener.accept().expect("connected");
        assert!(publisher.in_flight, "the last is on its way");
        assert_eq!(answer(&mut server), "/c");
        let ready = Ready {
            read: true,
            ..Ready::default()
        };
        publisher.on_ready(&mut reactor, ready);
        assert!(publisher.is_idle());
    }

    #[test]
    fn events_are_bounded_while_containerd_is_away() {
        let mut reactor = Reactor::new().expect("epoll");
        let mut publisher = Publisher::new("/nonexistent/ttrpc.sock", "ns");
        for _ in 0..KEPT + 5 {
            publisher.push(&mut reactor, "/a", "t", Vec::new());
        }
        assert_eq!(publisher.queue.len(), KEPT);
    }
}

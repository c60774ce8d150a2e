//! One connection of a ttrpc client: frames in with their descriptors, frames out. Knows no method.

use prost::Message;
use rustix::io::Errno;
use rustix::net::SendFlags;
use slipway_shim_api::frame::{self, HEADER, Header, Kind};
use slipway_shim_api::status::Code;
use slipway_shim_api::{names, ttrpc};
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// A client that leaves more answers than this unread is cut off.
const MAX_UNREAD: usize = 8 << 20;
/// Descriptors received and not yet claimed by a request's frame.
const MAX_UNCLAIMED: usize = 64;

/// Whom an answer is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Reply {
    /// The connection.
    pub conn: u32,
    /// The call on it.
    pub stream: u32,
}

/// A request as it came in.
#[derive(Debug)]
pub struct Incoming {
    /// The call.
    pub stream: u32,
    /// Its envelope.
    pub request: ttrpc::Request,
    /// The descriptors that came with it.
    pub fds: Vec<OwnedFd>,
}

/// Why a connection ends.
#[derive(Debug, thiserror::Error)]
pub enum Broken {
    /// The client closed it.
    #[error("the client is gone")]
    Closed,
    /// Reading or writing failed.
    #[error("use the connection")]
    Io(#[from] io::Error),
    /// It speaks something else.
    #[error("read a frame")]
    Frame(#[from] frame::TooLong),
    /// A frame's data is no request.
    #[error("decode a request")]
    Decode(#[from] prost::DecodeError),
    /// A bound was passed.
    #[error("the client {0}")]
    Greedy(&'static str),
}

/// The connection's socket and what is half in or half out.
#[derive(Debug)]
pub struct Conn {
    socket: OwnedFd,
    input: Vec<u8>,
    fds: VecDeque<OwnedFd>,
    output: Vec<u8>,
    /// Room to write is being waited for.
    pub waits_for_room: bool,
}

impl Conn {
    /// A connection just accepted, non-blocking.
    pub fn new(socket: OwnedFd) -> Conn {
        Conn {
            socket,
            input: Vec::new(),
            fds: VecDeque::new(),
            output: Vec::new(),
            waits_for_room: false,
        }
    }

    /// The socket, to be watched.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Whether there is something left to be written.
    pub fn has_output(&self) -> bool {
        !self.output.is_empty()
    }

    /// Reads what is there, at most a buffer full, and appends the requests that are complete.
    ///
    /// # Errors
    /// When the connection is to be closed.
    pub fn read(&mut self, scratch: &mut [u8], requests: &mut Vec<Incoming>) -> Result<(), Broken> {
        let mut fds = Vec::new();
        let n = match slipway_sys::fd::recv_fds(&self.socket, scratch, &mut fds) {
            Ok(0) => return Err(Broken::Closed),
            Ok(n) => n,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(e) => return Err(e.into()),
        };
        self.fds.extend(fds);
        self.input.extend_from_slice(&scratch[..n]);
        let mut at = 0;
        while let Some(bytes) = self.input[at..].first_chunk::<HEADER>() {
            let header = Header::decode(bytes)?;
            let Some(data) = self.input[at + HEADER..].get(..header.length as usize) else {
                break;
            };
            at += HEADER + data.len();
            if header.kind != Kind::Request {
                // Streams' data, and whatever a later protocol has: nobody here waits for it.
                continue;
            }
            let request = ttrpc::Request::decode(data)?;
            let claimed = claimed(&request).min(self.fds.len());
            requests.push(Incoming {
                stream: header.stream,
                request,
                fds: self.fds.drain(..claimed).collect(),
            });
        }
        self.input.drain(..at);
        if self.input.is_empty() {
            self.input = Vec::new();
        }
        if self.fds.len() > MAX_UNCLAIMED {
            return Err(Broken::Greedy("sends descriptors that no request asks for"));
        }
        Ok(())
    }

    /// Queues an answer and writes as much as goes.
    ///
    /// # Errors
    /// When the connection is to be closed.
    pub fn respond(&mut self, stream: u32, response: &ttrpc::Response) -> Result<(), Broken> {
        match frame::encode(stream, Kind::Response, response) {
            Ok(frame) => self.output.extend(frame),
            // This call fails; the others on the connection have nothing to do with it.
            Err(too_long) => {
                let status = ttrpc::Status {
                    code: Code::ResourceExhausted as i32,
                    message: format!("the answer does not fit in a frame: {too_long}"),
                };
                let response = ttrpc::Response {
                    status: Some(status),
                    payload: Vec::new(),
                };
                self.output
                    .extend(frame::encode(stream, Kind::Response, &response)?);
            }
        }
        if self.output.len() > MAX_UNREAD {
            return Err(Broken::Greedy("does not read its answers"));
        }
        self.write()
    }

    /// Writes as much as goes.
    ///
    /// # Errors
    /// When the connection is to be closed.
    pub fn write(&mut self) -> Result<(), Broken> {
        let mut written = 0;
        let result = loop {
            if written == self.output.len() {
                break Ok(());
            }
            match rustix::net::send(&self.socket, &self.output[written..], SendFlags::NOSIGNAL) {
                Ok(n) => written += n,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break Ok(()),
                Err(Errno::PIPE | Errno::CONNRESET) => break Err(Broken::Closed),
                Err(e) => break Err(Broken::Io(e.into())),
            }
        };
        self.output.drain(..written);
        if self.output.is_empty() {
            self.output = Vec::new();
        }
        result
    }
}

/// How many descriptors a request says it carries.
fn claimed(request: &ttrpc::Request) -> usize {
    let said = request.metadata.iter().find(|kv| kv.key == names::FDS);
    said.and_then(|kv| kv.value.parse().ok())
        .map_or(0, |n: usize| n.min(names::MAX_FDS))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    fn pair() -> (Conn, OwnedFd) {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None).expect("sockets");
        (Conn::new(ours), theirs)
    }

    fn request(method: &str, fds: usize) -> ttrpc::Request {
        let metadata = match fds {
            0 => Vec::new(),
            n => vec![ttrpc::KeyValue {
                key: names::FDS.into(),
                value: n.to_string(),
            }],
        };
        ttrpc::Request {
            service: "s".into(),
            method: method.into(),
            metadata,
            ..Default::default()
        }
    }

    #[test]
    fn requests_come_out_whole_however_the_bytes_arrive() {
        let (mut conn, client) = pair();
        let mut bytes = frame::encode(1, Kind::Request, &request("a", 0)).expect("short");
        bytes.extend(frame::encode(3, Kind::Request, &request("b", 0)).expect("short"));
        let mut requests = Vec::new();
        for byte in bytes {
            rustix::io::write(&client, &[byte]).expect("sent");
            conn.read(&mut [0; 64], &mut requests).expect("read");
        }
        let seen: Vec<_> = requests
            .iter()
            .map(|r| (r.stream, r.request.method.as_str()))
            .collect();
        assert_eq!(seen, [(1, "a"), (3, "b")]);
        assert_eq!(conn.input.capacity(), 0);
    }

    #[test]
    fn descriptors_go_to_the_requests_that_sent_them() {
        let (mut conn, client) = pair();
        let (read, write) = rustix::pipe::pipe().expect("a pipe");
        let mut requests = Vec::new();
        for (stream, fds) in [
            (1, vec![read.as_fd()]),
            (3, vec![]),
            (5, vec![write.as_fd(), read.as_fd()]),
        ] {
            let bytes = frame::encode(stream, Kind::Request, &request("m", fds.len())).expect("short");
            slipway_sys::fd::send_fds(&client, &bytes, &fds).expect("sent");
        }
        let mut scratch = [0; 4096];
        for _ in 0..4 {
            conn.read(&mut scratch, &mut requests).expect("read");
        }
        let counts: Vec<_> = requests.iter().map(|r| (r.stream, r.fds.len())).collect();
        assert_eq!(counts, [(1, 1), (3, 0), (5, 2)]);
        rustix::io::write(&requests[2].fds[0], b"x").expect("the write end came first");
    }

    #[test]
    fn a_frame_too_long_and_a_closed_socket_end_the_connection() {
        let (mut conn, client) = pair();
        let header = Header {
            length: u32::MAX,
            stream: 1,
            kind: Kind::Request,
            flags: 0,
        };
        rustix::io::write(&client, &header.encode()).expect("sent");
        assert!(matches!(
            conn.read(&mut [0; 64], &mut Vec::new()),
            Err(Broken::Frame(_))
        ));
        let (mut conn, client) = pair();
        drop(client);
        assert!(matches!(
            conn.read(&mut [0; 64], &mut Vec::new()),
            Err(Broken::Closed)
        ));
    }

    #[test]
    fn an_answer_that_fits_in_no_frame_fails_its_call_and_no_other() {
        let (mut conn, client) = pair();
        let response = ttrpc::Response {
            payload: vec![0; frame::MAX_DATA + 1],
            ..Default::default()
        };
        conn.respond(7, &response).expect("the connection goes on");
        let mut bytes = [0; 4096];
        let n = rustix::io::read(&client, &mut bytes).expect("an answer");
        let header = Header::decode(bytes.first_chunk().expect("ten bytes")).expect("a header");
        assert_eq!((header.stream, header.length as usize), (7, n - HEADER));
        let answer = ttrpc::Response::decode(&bytes[HEADER..n]).expect("a response");
        assert_eq!(
            answer.status.map(|s| s.code),
            Some(Code::ResourceExhausted as i32)
        );
    }

    #[test]
    fn a_client_that_does_not_read_is_cut_off() {
        let (mut conn, _client) = pair();
        let response = ttrpc::Response {
            payload: vec![0; 1 << 20],
            ..Default::default()
        };
        let cut = (0..20).find_map(|i| conn.respond(i, &response).err());
        assert!(matches!(cut, Some(Broken::Greedy(_))), "{cut:?}");
    }
}

//! As much of D-Bus as asking systemd for units takes: connect, authenticate as root, call a method, hear signals.
//!
//! The wire format is that of the D-Bus Specification, version 1, little endian. Values are written in the shapes systemd
//! wants and skipped, or read as strings, when they come back.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// A message larger than this is not for us.
const MAX_MESSAGE: usize = 1 << 20;

/// A value of one of the types systemd's unit properties have.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value {
    Bool(bool),
    U64(u64),
    Str(String),
    Bytes(Vec<u8>),
    U32s(Vec<u32>),
}

impl Value {
    fn signature(&self) -> &'static str {
        match self {
            Value::Bool(_) => "b",
            Value::U64(_) => "t",
            Value::Str(_) => "s",
            Value::Bytes(_) => "ay",
            Value::U32s(_) => "au",
        }
    }
}

/// A message being written: everything is aligned to its own size, counted from the beginning of the message, and the
/// body begins at a multiple of eight, so the body may count from itself.
#[derive(Debug, Default, Clone, PartialEq)]
pub(super) struct Body {
    bytes: Vec<u8>,
    signature: String,
}

impl Body {
    fn pad(&mut self, to: usize) {
        self.bytes.resize(self.bytes.len().next_multiple_of(to), 0);
    }

    fn put_u32(&mut self, n: u32) {
        self.pad(4);
        self.bytes.extend(n.to_le_bytes());
    }

    fn put_str(&mut self, s: &str) {
        self.put_u32(s.len() as u32);
        self.bytes.extend(s.as_bytes());
        self.bytes.push(0);
    }

    fn put_signature(&mut self, s: &str) {
        self.bytes.push(s.len() as u8);
        self.bytes.extend(s.as_bytes());
        self.bytes.push(0);
    }

    /// An array: its length counts from its first element, whose alignment is not part of it.
    fn put_array(&mut self, align: usize, fill: impl FnOnce(&mut Body)) {
        self.put_u32(0);
        let at = self.bytes.len() - 4;
        self.pad(align);
        let from = self.bytes.len();
        fill(self);
        let length = (self.bytes.len() - from) as u32;
        self.bytes[at..at + 4].copy_from_slice(&length.to_le_bytes());
    }

    fn put_variant(&mut self, value: &Value) {
        self.put_signature(value.signature());
        match value {
            Value::Bool(b) => self.put_u32(u32::from(*b)),
            Value::U64(n) => {
                self.pad(8);
                self.bytes.extend(n.to_le_bytes());
            }
            Value::Str(s) => self.put_str(s),
            Value::Bytes(list) => self.put_array(1, |b| b.bytes.extend(list)),
            Value::U32s(list) => self.put_array(4, |b| list.iter().for_each(|n| b.put_u32(*n))),
        }
    }

    /// "s".
    pub(super) fn string(mut self, s: &str) -> Body {
        self.put_str(s);
        self.signature.push('s');
        self
    }

    /// "b".
    pub(super) fn boolean(mut self, b: bool) -> Body {
        self.put_u32(u32::from(b));
        self.signature.push('b');
        self
    }

    /// "a(sv)": properties.
    pub(super) fn properties(mut self, list: &[(&str, Value)]) -> Body {
        self.put_array(8, |b| {
            for (name, value) in list {
                b.pad(8);
                b.put_str(name);
                b.put_variant(value);
            }
        });
        self.signature.push_str("a(sv)");
        self
    }

    /// "a(sa(sv))", empty: the auxiliary units of StartTransientUnit.
    pub(super) fn no_units(mut self) -> Body {
        self.put_array(8, |_| {});
        self.signature.push_str("a(sa(sv))");
        self
    }
}

/// Header fields (D-Bus Specification, "Header Fields").
const PATH: u8 = 1;
const INTERFACE: u8 = 2;
const MEMBER: u8 = 3;
const ERROR_NAME: u8 = 4;
const REPLY_SERIAL: u8 = 5;
const DESTINATION: u8 = 6;
const SIGNATURE: u8 = 8;

const CALL: u8 = 1;
const REPLY: u8 = 2;
const ERROR: u8 = 3;
const SIGNAL: u8 = 4;

/// Where a call goes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Method<'a> {
    pub(super) destination: Option<&'a str>,
    pub(super) path: &'a str,
    pub(super) interface: &'a str,
    pub(super) member: &'a str,
}

fn encode_call(serial: u32, method: Method<'_>, body: &Body) -> Vec<u8> {
    let mut out = Body::default();
    out.bytes.extend([b'l', CALL, 0, 1]);
    out.put_u32(body.bytes.len() as u32);
    out.put_u32(serial);
    out.put_array(8, |b| {
        let mut field = |code: u8, signature: &str, value: &str| {
            b.pad(8);
            b.bytes.push(code);
            b.put_signature(signature);
            if signature == "g" {
                b.put_signature(value)
            } else {
                b.put_str(value)
            }
        };
        field(PATH, "o", method.path);
        field(INTERFACE, "s", method.interface);
        field(MEMBER, "s", method.member);
        if let Some(destination) = method.destination {
            field(DESTINATION, "s", destination);
        }
        if !body.signature.is_empty() {
            field(SIGNATURE, "g", &body.signature);
        }
    });
    out.pad(8);
    out.bytes.extend(&body.bytes);
    out.bytes
}

/// A message that came.
#[derive(Debug, Default, Clone, PartialEq)]
pub(super) struct Message {
    kind: u8,
    reply_to: u32,
    member: String,
    error: String,
    signature: String,
    body: Vec<u8>,
}

/// Reads values in order; nothing of what comes is trusted to be whole.
struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, align: usize, n: usize) -> Option<&'a [u8]> {
        let from = self.at.next_multiple_of(align);
        let part = self.bytes.get(from..from.checked_add(n)?)?;
        self.at = from + n;
        Some(part)
    }

    fn u32(&mut self) -> Option<u32> {
        self.take(4, 4)
            .and_then(|b| b.try_into().ok())
            .map(u32::from_le_bytes)
    }

    fn string(&mut self) -> Option<String> {
        let n = self.u32()? as usize;
        let s = self.take(1, n)?;
        self.take(1, 1)?;
        Some(String::from_utf8_lossy(s).into_owned())
    }

    fn signature(&mut self) -> Option<String> {
        let n = self.take(1, 1)?[0] as usize;
        let s = self.take(1, n)?;
        self.take(1, 1)?;
        Some(String::from_utf8_lossy(s).into_owned())
    }
}

/// How long a whole message is, from its first sixteen bytes.
fn message_length(head: &[u8; 16]) -> io::Result<usize> {
    let number =
        |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]) as usize;
    if head[0] != b'l' || head[3] != 1 {
        return Err(invalid("a D-Bus message of another byte order or version"));
    }
    let (body, fields) = (number(4), number(12));
    let length = (16usize.saturating_add(fields))
        .next_multiple_of(8)
        .saturating_add(body);
    if length > MAX_MESSAGE {
        Err(invalid("a D-Bus message of more than a megabyte"))
    } else {
        Ok(length)
    }
}

fn parse(bytes: &[u8]) -> Option<Message> {
    let fields = u32::from_le_bytes(bytes.get(12..16)?.try_into().ok()?) as usize;
    let mut message = Message {
        kind: *bytes.get(1)?,
        ..Message::default()
    };
    let end = 16 + fields;
    let mut r = Reader {
        bytes: bytes.get(..end)?,
        at: 16,
    };
    while r.at.next_multiple_of(8) < end {
        let code = r.take(8, 1)?[0];
        match (code, r.signature()?.as_str()) {
            (REPLY_SERIAL, "u") => message.reply_to = r.u32()?,
            (MEMBER, "s") => message.member = r.string()?,
            (ERROR_NAME, "s") => message.error = r.string()?,
            (SIGNATURE, "g") => message.signature = r.signature()?,
            (_, "s" | "o") => drop(r.string()?),
            (_, "g") => drop(r.signature()?),
            (_, "u") => drop(r.u32()?),
            _ => return None,
        }
    }
    message.body = bytes.get(end.next_multiple_of(8)..)?.to_vec();
    Some(message)
}

impl Message {
    /// The strings and object paths the body begins with; numbers among them are passed over.
    pub(super) fn strings(&self) -> Vec<String> {
        let mut r = Reader {
            bytes: &self.body,
            at: 0,
        };
        let mut out = Vec::new();
        for c in self.signature.chars() {
            let ok = match c {
                's' | 'o' => r.string().map(|s| out.push(s)),
                'u' | 'b' | 'i' => r.u32().map(drop),
                _ => None,
            };
            if ok.is_none() {
                break;
            }
        }
        out
    }
}

fn invalid(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

/// What a call came back with.
#[derive(Debug)]
pub(super) enum CallError {
    /// The other side's error: its name and text.
    Remote { name: String, text: String },
    /// The connection's.
    Io(io::Error),
}

impl From<io::Error> for CallError {
    fn from(e: io::Error) -> CallError {
        CallError::Io(e)
    }
}

/// A connection.
#[derive(Debug)]
pub(super) struct Connection {
    stream: UnixStream,
    serial: u32,
    /// Signals that came while something else was waited for.
    signals: Vec<Message>,
    until: Instant,
}

impl Connection {
    /// Connects and authenticates; everything on this connection has to be done within `patience`.
    pub(super) fn open(socket: &Path, patience: Duration) -> io::Result<Connection> {
        let stream = UnixStream::connect(socket)?;
        let mut c = Connection {
            stream,
            serial: 0,
            signals: Vec::new(),
            until: Instant::now() + patience,
        };
        c.deadline()?;
        let id: String = rustix::process::geteuid()
            .as_raw()
            .to_string()
            .bytes()
            .map(|b| format!("{b:02x}"))
            .collect();
        // BEGIN goes with it, and nothing more before the answer: systemd's side, when it finds the whole of a first message
        // behind BEGIN in one read, forgets it until more comes.
        c.stream
            .write_all(format!("\0AUTH EXTERNAL {id}\r\nBEGIN\r\n").as_bytes())?;
        if !c.line()?.starts_with("OK ") {
            return Err(invalid("the D-Bus server does not accept us"));
        }
        Ok(c)
    }

    fn deadline(&mut self) -> io::Result<()> {
        let left = self.until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.stream.set_read_timeout(Some(left))?;
        self.stream.set_write_timeout(Some(left))
    }

    fn line(&mut self) -> io::Result<String> {
        let mut line = Vec::new();
        while !line.ends_with(b"\r\n") {
            let mut byte = [0u8; 1];
            self.stream.read_exact(&mut byte)?;
            line.push(byte[0]);
            if line.len() > 1024 {
                return Err(invalid("an endless line"));
            }
        }
        Ok(String::from_utf8_lossy(&line).into_owned())
    }

    /// Calls a method and waits for its reply.
    pub(super) fn call(&mut self, method: Method<'_>, body: &Body) -> Result<Message, CallError> {
        self.serial += 1;
        let serial = self.serial;
        self.deadline()?;
        self.stream.write_all(&encode_call(serial, method, body))?;
        loop {
            let message = self.receive()?;
            match message.kind {
                REPLY if message.reply_to == serial => return Ok(message),
                ERROR if message.reply_to == serial => {
                    let text = message.strings().into_iter().next().unwrap_or_default();
                    return Err(CallError::Remote {
                        name: message.error,
                        text,
                    });
                }
                SIGNAL => self.signals.push(message),
                _ => {}
            }
        }
    }

    /// Waits for a signal that `wanted` takes; others are forgotten.
    pub(super) fn signal<T>(
        &mut self,
        member: &str,
        wanted: impl Fn(&Message) -> Option<T>,
    ) -> io::Result<T> {
        loop {
            for message in std::mem::take(&mut self.signals) {
                if message.member == member
                    && let Some(found) = wanted(&message)
                {
                    return Ok(found);
                }
            }
            let message = self.receive()?;
            if message.kind == SIGNAL {
                self.signals.push(message);
            }
        }
    }

    fn receive(&mut self) -> io::Result<Message> {
        self.deadline()?;
        let mut head = [0u8; 16];
        self.stream.read_exact(&mut head)?;
        let mut bytes = head.to_vec();
        bytes.resize(message_length(&head)?, 0);
        self.deadline()?;
        self.stream.read_exact(&mut bytes[16..])?;
        parse(&bytes).ok_or_else(|| invalid("a D-Bus message that contradicts itself"))
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A reply, error or signal as a server would send it.
    pub(in super::super) fn message(kind: u8, reply_to: u32, member: &str, strings: &[&str]) -> Vec<u8> {
        let mut body = Body::default();
        for s in strings {
            body = body.string(s);
        }
        let mut out = Body::default();
        out.bytes.extend([b'l', kind, 0, 1]);
        out.put_u32(body.bytes.len() as u32);
        out.put_u32(77);
        out.put_array(8, |b| {
            if reply_to != 0 {
                b.pad(8);
                b.bytes.push(REPLY_SERIAL);
                b.put_signature("u");
                b.put_u32(reply_to);
            }
            b.pad(8);
            b.bytes.push(if kind == ERROR { ERROR_NAME } else { MEMBER });
            b.put_signature("s");
            b.put_str(member);
            b.pad(8);
            b.bytes.push(SIGNATURE);
            b.put_signature("g");
            b.put_signature(&body.signature);
        });
        out.pad(8);
        out.bytes.extend(&body.bytes);
        out.bytes
    }

    #[test]
    fn a_call_is_encoded_as_the_specification_lays_it_out() {
        let method = Method {
            destination: None,
            path: "/p",
            interface: "i.f",
            member: "M",
        };
        let bytes = encode_call(1, method, &Body::default().string("ab").boolean(true));
        #[rustfmt::skip]
        let expected: &[u8] = &[
            b'l', 1, 0, 1,  12, 0, 0, 0,  1, 0, 0, 0,  56, 0, 0, 0,
            1, 1, b'o', 0,  2, 0, 0, 0,  b'/', b'p', 0, 0, 0, 0, 0, 0,
            2, 1, b's', 0,  3, 0, 0, 0,  b'i', b'.', b'f', 0, 0, 0, 0, 0,
            3, 1, b's', 0,  1, 0, 0, 0,  b'M', 0, 0, 0, 0, 0, 0, 0,
            8, 1, b'g', 0,  2, b's', b'b', 0,
            2, 0, 0, 0, b'a', b'b', 0, 0,  1, 0, 0, 0,
        ];
        assert_eq!(bytes, expected);
    }

    #[test]
    fn properties_are_aligned_by_their_types() {
        let list = [
            ("A", Value::U64(5)),
            ("B", Value::Str("x".into())),
            ("C", Value::U32s(vec![9])),
        ];
        let body = Body::default().properties(&list);
        assert_eq!(body.signature, "a(sv)");
        let mut r = Reader {
            bytes: &body.bytes,
            at: 0,
        };
        let length = r.u32().unwrap() as usize;
        assert_eq!(
            length + 8,
            body.bytes.len(),
            "four bytes of padding before the first struct"
        );
        r.take(8, 0).unwrap();
        assert_eq!(
            (r.string().unwrap().as_str(), r.signature().unwrap().as_str()),
            ("A", "t")
        );
        assert_eq!(r.take(8, 8).unwrap(), 5u64.to_le_bytes());
        r.take(8, 0).unwrap();
        assert_eq!(
            (r.string().unwrap().as_str(), r.signature().unwrap().as_str()),
            ("B", "s")
        );
        assert_eq!(r.string().unwrap(), "x");
    }

    #[test]
    fn what_comes_is_parsed_and_nonsense_is_refused() {
        let bytes = message(REPLY, 3, "", &["/job/1", "two"]);
        let head: &[u8; 16] = bytes[..16].try_into().unwrap();
        assert_eq!(message_length(head).unwrap(), bytes.len());
        let parsed = parse(&bytes).unwrap();
        assert_eq!((parsed.kind, parsed.reply_to), (REPLY, 3));
        assert_eq!(parsed.strings(), ["/job/1", "two"]);
        for cut in 0..bytes.len() {
            let _ = parse(&bytes[..cut]);
        }
        for n in 0..bytes.len() {
            let mut broken = bytes.clone();
            broken[n] ^= 0xff;
            let _ = parse(&broken).map(|m| m.strings());
        }
        assert!(message_length(&[0xff; 16]).is_err());
    }
}

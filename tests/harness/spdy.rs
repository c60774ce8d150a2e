//! A streaming client as plain as can be, over SPDY/3.1: for what no real client does, like leaving in the middle, and for
//! measuring a runtime's server by itself. It keeps no windows, as the one that Kubernetes has keeps none.

use anyhow::{Result, bail, ensure};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::websocket::request;

/// What exec and attach speak.
pub const V4: &str = "v4.channel.k8s.io";
/// What port-forward speaks.
pub const FORWARD: &str = "portforward.k8s.io";

/// What is read at once.
const READ: usize = 256 << 10;
const FIN: u8 = 1;
const GOAWAY: u16 = 7;

/// The headers of an upgrade to SPDY.
#[must_use]
pub fn upgrade(protocol: &str) -> [(&'static str, &str); 3] {
    [
        ("Connection", "Upgrade"),
        ("Upgrade", "SPDY/3.1"),
        ("X-Stream-Protocol-Version", protocol),
    ]
}

/// What the server has said.
#[derive(Debug, PartialEq, Eq)]
pub enum Told {
    /// Some of a stream's data, as it arrived: its length.
    Data {
        /// The stream.
        id: u32,
        /// How many bytes.
        count: usize,
    },
    /// It says nothing more on this stream.
    End(u32),
    /// The status of its goodbye: 0 where nothing was wrong.
    GoAway(u32),
    /// A control frame of another type.
    Control(u16),
}

/// An open session.
pub struct Spdy {
    stream: TcpStream,
    /// The deflated headers have begun.
    began: bool,
    last: u32,
    buffer: Vec<u8>,
    /// What of `buffer` was read and not told yet.
    from: usize,
    to: usize,
    /// What is left of a data frame: its stream, its length, whether it is the stream's last.
    frame: Option<(u32, usize, bool)>,
}

impl Spdy {
    /// Opens a session.
    ///
    /// # Errors
    /// The server does not agree.
    pub async fn open(url: &str, protocol: &str) -> Result<Spdy> {
        let (status, stream) = request(url, &upgrade(protocol)).await?;
        ensure!(status == 101, "answered {status}");
        stream.set_nodelay(true)?;
        Ok(Spdy {
            stream,
            began: false,
            last: 0,
            buffer: vec![0; READ],
            from: 0,
            to: 0,
            frame: None,
        })
    }

    /// Opens the streams of a command: `error`, and those named; their numbers in this order.
    ///
    /// # Errors
    /// The connection is gone.
    pub async fn command(&mut self, streams: &[&str]) -> Result<Vec<u32>> {
        let mut ids = vec![self.stream(&[("streamtype", "error")]).await?];
        for kind in streams {
            ids.push(self.stream(&[("streamtype", kind)]).await?);
        }
        Ok(ids)
    }

    /// Opens the streams of a forwarded connection; the number of the one with the data.
    ///
    /// # Errors
    /// The connection is gone.
    pub async fn forward(&mut self, port: u16) -> Result<u32> {
        let (port, request) = (port.to_string(), self.last.to_string());
        let of = |kind| {
            [
                ("streamtype", kind),
                ("port", port.as_str()),
                ("requestid", &request),
            ]
        };
        self.stream(&of("error")).await?;
        self.stream(&of("data")).await
    }

    /// Opens a stream; its number.
    ///
    /// # Errors
    /// The connection is gone.
    pub async fn stream(&mut self, headers: &[(&str, &str)]) -> Result<u32> {
        self.last = if self.last == 0 { 1 } else { self.last + 2 };
        let mut plain = u32::try_from(headers.len())?.to_be_bytes().to_vec();
        for text in headers.iter().flat_map(|(name, value)| [name, value]) {
            plain.extend(u32::try_from(text.len())?.to_be_bytes());
            plain.extend(text.as_bytes());
        }
        let mut payload = [&self.last.to_be_bytes()[..], &[0; 6]].concat();
        // Stored, not compressed (RFC 1950, 2.2; RFC 1951, 3.2.4): then no dictionary is needed.
        if !std::mem::replace(&mut self.began, true) {
            payload.extend([0x78, 1]);
        }
        let length = u16::try_from(plain.len())?;
        payload.push(0);
        payload.extend(length.to_le_bytes());
        payload.extend((!length).to_le_bytes());
        payload.extend(plain);
        // An empty block says that this is all for now: not every reader looks at what it has before.
        payload.extend([0, 0, 0, 0xff, 0xff]);
        let mut frame = vec![0x80, 3, 0, 1];
        frame.extend(u32::try_from(payload.len())?.to_be_bytes());
        frame.extend(payload);
        self.raw(&frame).await?;
        Ok(self.last)
    }

    /// Sends data of a stream, less than 16 MiB of it; `last`: there is no more.
    ///
    /// # Errors
    /// The connection is gone.
    pub async fn send(&mut self, id: u32, data: &[u8], last: bool) -> Result<()> {
        let flags = if last { u32::from(FIN) << 24 } else { 0 };
        ensure!(data.len() < 1 << 24, "a frame of {} bytes", data.len());
        let size = flags | u32::try_from(data.len())?;
        self.raw(&[id.to_be_bytes(), size.to_be_bytes()].concat()).await?;
        self.raw(data).await
    }

    /// Sends bytes as they are.
    ///
    /// # Errors
    /// The connection is gone.
    pub async fn raw(&mut self, bytes: &[u8]) -> Result<()> {
        Ok(self.stream.write_all(bytes).await?)
    }

    /// What the server says next, `data` being given a stream's data; `None` when it has closed the connection.
    /// Its PINGs are answered.
    ///
    /// # Errors
    /// The connection broke off in the middle of something.
    pub async fn next(&mut self, mut data: impl FnMut(&[u8])) -> Result<Option<Told>> {
        loop {
            if let Some((id, left, last)) = self.frame {
                if left == 0 {
                    self.frame = None;
                    if last {
                        return Ok(Some(Told::End(id)));
                    }
                    continue;
                }
                if self.from == self.to && !self.fill().await? {
                    bail!("the connection ends within a frame of stream {id}");
                }
                let count = left.min(self.to - self.from);
                data(&self.buffer[self.from..self.from + count]);
                self.from += count;
                self.frame = Some((id, left - count, last));
                return Ok(Some(Told::Data { id, count }));
            }
            while self.to - self.from < 8 {
                if !self.fill().await? {
                    ensure!(self.to == self.from, "the connection ends within a frame's head");
                    return Ok(None);
                }
            }
            let (first, second) = (self.number(0), self.number(4));
            let (flags, length) = ((second >> 24) as u8, (second & 0x00ff_ffff) as usize);
            self.from += 8;
            if first >> 31 == 0 {
                self.frame = Some((first, length, flags & FIN != 0));
                continue;
            }
            ensure!(length < READ, "a control frame of {length} bytes");
            while self.to - self.from < length {
                ensure!(self.fill().await?, "the connection ends within a control frame");
            }
            let word = |at: usize| (length >= at + 4).then(|| self.number(at));
            let kind = (first & 0xffff) as u16;
            let told = match (kind, word(0), word(4)) {
                (6, Some(id), _) => {
                    let ping = [0x8003_0006_u32, 4, id].map(u32::to_be_bytes).concat();
                    self.raw(&ping).await?;
                    Told::Control(kind)
                }
                (GOAWAY, _, Some(status)) => Told::GoAway(status),
                _ => Told::Control(kind),
            };
            self.from += length;
            return Ok(Some(told));
        }
    }

    fn number(&self, at: usize) -> u32 {
        let at = self.from + at;
        let bytes = [0, 1, 2, 3].map(|i| self.buffer[at + i]);
        u32::from_be_bytes(bytes)
    }

    /// Reads more; false at the end of the connection.
    async fn fill(&mut self) -> Result<bool> {
        self.buffer.copy_within(self.from..self.to, 0);
        self.to -= self.from;
        self.from = 0;
        let count = self.stream.read(&mut self.buffer[self.to..]).await?;
        self.to += count;
        Ok(count > 0)
    }
}

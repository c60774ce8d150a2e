//! SPDY/3.1 as a client speaks it. Like the one that Kubernetes uses it ignores windows, unless it is told to keep them.

use std::collections::BTreeMap;

use bytes::{Buf, BytesMut};
use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

use super::http::Io;

#[path = "../../../src/spdy/dictionary.rs"]
mod dictionary;

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    Data { id: u32, fin: bool, data: Vec<u8> },
    SynReply { id: u32 },
    Reset { id: u32, status: u32 },
    Settings(Vec<(u32, u32)>),
    Ping(u32),
    GoAway { last: u32, status: u32 },
    WindowUpdate { id: u32, delta: u32 },
}

pub struct Writer {
    io: Box<dyn AsyncWrite + Send + Unpin>,
    deflate: Compress,
}

impl Writer {
    pub async fn raw(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.io.write_all(bytes).await?;
        self.io.flush().await
    }

    pub async fn control(&mut self, kind: u16, flags: u8, payload: &[u8]) -> std::io::Result<()> {
        let mut frame = vec![0x80, 3];
        frame.extend(kind.to_be_bytes());
        frame.push(flags);
        frame.extend(&(payload.len() as u32).to_be_bytes()[1..]);
        frame.extend(payload);
        self.raw(&frame).await
    }

    pub async fn numbers(&mut self, kind: u16, numbers: &[u32]) -> std::io::Result<()> {
        let payload: Vec<u8> = numbers.iter().flat_map(|number| number.to_be_bytes()).collect();
        self.control(kind, 0, &payload).await
    }

    pub async fn syn(&mut self, id: u32, headers: &[(&str, &str)]) -> std::io::Result<()> {
        let mut plain = (headers.len() as u32).to_be_bytes().to_vec();
        for text in headers.iter().flat_map(|(name, value)| [name, value]) {
            plain.extend((text.len() as u32).to_be_bytes());
            plain.extend(text.as_bytes());
        }
        let mut block = Vec::with_capacity(plain.len() + 128);
        self.deflate
            .compress_vec(&plain, &mut block, FlushCompress::Sync)
            .unwrap();
        let payload = [&id.to_be_bytes()[..], &[0; 6], &block].concat();
        self.control(1, 0, &payload).await
    }

    pub async fn data(&mut self, id: u32, fin: bool, data: &[u8]) -> std::io::Result<()> {
        let mut head = [0; 8];
        head[..4].copy_from_slice(&id.to_be_bytes());
        head[4..].copy_from_slice(&((u32::from(fin) << 24) | data.len() as u32).to_be_bytes());
        self.io.write_all(&head).await?;
        self.raw(data).await
    }
}

pub struct Reader {
    io: Box<dyn AsyncRead + Send + Unpin>,
    input: BytesMut,
    inflate: Decompress,
}

impl Reader {
    /// The next frame; `None` when the server has closed the connection.
    pub async fn next(&mut self) -> Option<Frame> {
        while self.input.len() < 8 {
            if self.io.read_buf(&mut self.input).await.ok()? == 0 {
                assert!(self.input.is_empty(), "a torn frame");
                return None;
            }
        }
        let first = self.input.get_u32();
        let second = self.input.get_u32();
        let (flags, length) = ((second >> 24) as u8, (second & 0x00ff_ffff) as usize);
        self.input.reserve(length.saturating_sub(self.input.len()));
        while self.input.len() < length {
            assert!(self.io.read_buf(&mut self.input).await.ok()? > 0, "a torn frame");
        }
        let payload = self.input.split_to(length);
        if first >> 31 == 0 {
            return Some(Frame::Data {
                id: first,
                fin: flags & 1 != 0,
                data: payload.to_vec(),
            });
        }
        assert_eq!(first >> 16, 0x8003, "a control frame of SPDY/3");
        let words: Vec<u32> = payload
            .chunks(4)
            .filter(|c| c.len() == 4)
            .map(|c| u32::from_be_bytes(c.try_into().unwrap()))
            .collect();
        Some(match first & 0xffff {
            2 => {
                assert_eq!(self.unfold(&payload[4..]), [0; 4], "no headers");
                Frame::SynReply { id: words[0] }
            }
            3 => Frame::Reset {
                id: words[0],
                status: words[1],
            },
            4 => Frame::Settings(words[1..].chunks(2).map(|pair| (pair[0], pair[1])).collect()),
            6 => Frame::Ping(words[0]),
            7 => Frame::GoAway {
                last: words[0],
                status: words[1],
            },
            9 => Frame::WindowUpdate {
                id: words[0],
                delta: words[1],
            },
            kind => panic!("a frame of type {kind}"),
        })
    }

    fn unfold(&mut self, block: &[u8]) -> Vec<u8> {
        let mut plain = Vec::with_capacity(1024);
        let before = self.inflate.total_in();
        if let Err(error) = self
            .inflate
            .decompress_vec(block, &mut plain, FlushDecompress::Sync)
        {
            error.needs_dictionary().expect("the dictionary");
            self.inflate.set_dictionary(dictionary::DICTIONARY).unwrap();
            let taken = (self.inflate.total_in() - before) as usize;
            self.inflate
                .decompress_vec(&block[taken..], &mut plain, FlushDecompress::Sync)
                .unwrap();
        }
        plain
    }
}

pub fn split(io: Box<dyn Io>) -> (Writer, Reader) {
    let (read, write) = tokio::io::split(io);
    let mut deflate = Compress::new(Compression::best(), true);
    deflate.set_dictionary(dictionary::DICTIONARY).unwrap();
    let reader = Reader {
        io: Box::new(read),
        input: BytesMut::new(),
        inflate: Decompress::new(true),
    };
    (
        Writer {
            io: Box::new(write),
            deflate,
        },
        reader,
    )
}

/// What has come on one stream.
#[derive(Debug, Default)]
pub struct Got {
    pub data: Vec<u8>,
    pub replied: bool,
    pub finished: bool,
    pub reset: Option<u32>,
}

/// A connection used in turns.
pub struct Session {
    pub writer: Writer,
    pub reader: Reader,
    pub streams: BTreeMap<u32, Got>,
    pub goaway: Option<u32>,
    pub pongs: Vec<u32>,
    pub open: bool,
}

impl Session {
    pub fn new(io: Box<dyn Io>) -> Session {
        let (writer, reader) = split(io);
        Session {
            writer,
            reader,
            streams: BTreeMap::new(),
            goaway: None,
            pongs: vec![],
            open: true,
        }
    }

    /// Opens a stream and waits until it is accepted or reset; says which.
    pub async fn open(&mut self, id: u32, headers: &[(&str, &str)]) -> bool {
        self.writer.syn(id, headers).await.unwrap();
        self.until(|session| {
            session
                .streams
                .get(&id)
                .is_some_and(|stream| stream.replied || stream.reset.is_some())
        })
        .await;
        self.streams[&id].replied
    }

    /// Takes frames until something is so, or the connection ends.
    pub async fn until(&mut self, is_so: impl Fn(&Session) -> bool) {
        while !is_so(self) && self.step().await {}
    }

    pub async fn finished(&mut self, id: u32) -> &Got {
        self.until(|session| {
            session
                .streams
                .get(&id)
                .is_some_and(|stream| stream.finished || stream.reset.is_some())
        })
        .await;
        &self.streams[&id]
    }

    /// Takes one frame; false at the end.
    pub async fn step(&mut self) -> bool {
        let Some(frame) = self.reader.next().await else {
            self.open = false;
            return false;
        };
        match frame {
            Frame::Data { id, fin, data } => {
                let stream = self.streams.entry(id).or_default();
                assert!(stream.replied, "data before the reply");
                assert!(!stream.finished, "data after the end");
                stream.data.extend(data);
                stream.finished = fin;
            }
            Frame::SynReply { id } => self.streams.entry(id).or_default().replied = true,
            Frame::Reset { id, status } => self.streams.entry(id).or_default().reset = Some(status),
            Frame::Ping(id) if id % 2 == 0 => self.writer.numbers(6, &[id]).await.unwrap(),
            Frame::Ping(id) => self.pongs.push(id),
            Frame::GoAway { status, .. } => self.goaway = Some(status),
            Frame::Settings(_) | Frame::WindowUpdate { .. } => {}
        }
        true
    }
}

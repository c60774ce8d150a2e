//! WebSocket as a client speaks it.

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, DuplexStream, duplex};

use super::http::Io;

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    Binary(Vec<u8>),
    Ping(Vec<u8>),
    Pong(Vec<u8>),
    Close(u16),
}

pub struct Writer(Box<dyn AsyncWrite + Send + Unpin>);
pub struct Reader(Box<dyn AsyncRead + Send + Unpin>, BytesMut);

pub fn split(io: Box<dyn Io>) -> (Writer, Reader) {
    let (read, write) = tokio::io::split(io);
    (Writer(Box::new(write)), Reader(Box::new(read), BytesMut::new()))
}

impl Writer {
    pub async fn raw(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.0.write_all(bytes).await?;
        self.0.flush().await
    }

    pub async fn frame(&mut self, first: u8, payload: &[u8]) -> std::io::Result<()> {
        let mut frame = vec![first];
        match payload.len() {
            short @ 0..126 => frame.push(0x80 | short as u8),
            long @ 126..0x1_0000 => {
                frame.push(0x80 | 126);
                frame.extend((long as u16).to_be_bytes());
            }
            huge => {
                frame.push(0x80 | 127);
                frame.extend((huge as u64).to_be_bytes());
            }
        }
        let mask = [0xa5, 0x5a, 0x3c, 0xc3];
        frame.extend(mask);
        let at = frame.len();
        frame.extend_from_slice(payload);
        let (words, rest) = frame[at..].as_chunks_mut::<4>();
        for word in words {
            *word = (u32::from_ne_bytes(*word) ^ u32::from_ne_bytes(mask)).to_ne_bytes();
        }
        for (byte, mask) in rest.iter_mut().zip(mask) {
            *byte ^= mask;
        }
        self.raw(&frame).await
    }

    pub async fn channel(&mut self, channel: u8, data: &[u8]) -> std::io::Result<()> {
        self.frame(0x82, &[&[channel], data].concat()).await
    }
}

impl Reader {
    /// The next message; `None` when the server has closed the connection.
    pub async fn next(&mut self) -> Option<Message> {
        self.fill(2).await?;
        let (first, second) = (self.1.get_u8(), self.1.get_u8());
        assert_eq!(
            (first & 0xf0, second & 0x80),
            (0x80, 0),
            "a whole message without a mask"
        );
        let length = match second {
            126 => {
                self.fill(2).await?;
                self.1.get_u16() as usize
            }
            127 => {
                self.fill(8).await?;
                self.1.get_u64() as usize
            }
            short => short as usize,
        };
        self.fill(length).await?;
        let payload = self.1.split_to(length).to_vec();
        Some(match first & 0x0f {
            2 => Message::Binary(payload),
            8 => Message::Close(u16::from_be_bytes(payload[..2].try_into().unwrap())),
            9 => Message::Ping(payload),
            10 => Message::Pong(payload),
            opcode => panic!("opcode {opcode}"),
        })
    }

    async fn fill(&mut self, count: usize) -> Option<()> {
        self.1.reserve(count.saturating_sub(self.1.len()));
        while self.1.len() < count {
            if self.0.read_buf(&mut self.1).await.ok()? == 0 {
                return None;
            }
        }
        Some(())
    }
}

/// The bytes of SPDY in messages, as a connection of their own.
pub fn tunnel(io: Box<dyn Io>) -> DuplexStream {
    let (near, far) = duplex(64 << 10);
    let (mut writer, mut reader) = split(io);
    let (mut from_near, mut to_near) = tokio::io::split(far);
    tokio::spawn(async move {
        let mut chunk = vec![0; 32 << 10];
        while let Ok(count @ 1..) = from_near.read(&mut chunk).await {
            if writer.frame(0x82, &chunk[..count]).await.is_err() {
                return;
            }
        }
        let _ = writer.frame(0x88, &1000u16.to_be_bytes()).await;
    });
    tokio::spawn(async move {
        while let Some(message) = reader.next().await {
            match message {
                Message::Binary(data) if to_near.write_all(&data).await.is_ok() => {}
                _ => break,
            }
        }
        let _ = to_near.shutdown().await;
    });
    near
}

//! A streaming client as plain as can be, over WebSocket: for what no real client does, like leaving in the middle.

use anyhow::{Context, Result, bail};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::cri::Cri;
use crate::v1;

/// What version 5 of the protocol is called.
pub const V5: &str = "v5.channel.k8s.io";
/// Newer first: a server that has only the older one takes that.
const ANY: &str = "v5.channel.k8s.io, v4.channel.k8s.io";

/// Sends the head of a request to `url` and reads the head of the answer.
///
/// # Errors
/// Nobody answers there.
pub async fn request(url: &str, headers: &[(&str, &str)]) -> Result<(u16, TcpStream)> {
    let rest = url.strip_prefix("http://").context("not http")?;
    let (host, path) = rest.split_once('/').context("no path")?;
    let mut stream = TcpStream::connect(host).await?;
    let mut head = format!("GET /{path} HTTP/1.1\r\nHost: {host}\r\n");
    for (name, value) in headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    head.push_str("\r\n");
    stream.write_all(head.as_bytes()).await?;
    let mut answer = Vec::new();
    while !answer.ends_with(b"\r\n\r\n") {
        answer.push(stream.read_u8().await.context("the answer broke off")?);
    }
    let line = String::from_utf8_lossy(&answer);
    let status = line.split(' ').nth(1).and_then(|code| code.parse().ok());
    Ok((status.context("no status")?, stream))
}

/// The headers of an upgrade to a WebSocket.
#[must_use]
pub fn upgrade(protocol: &str) -> [(&'static str, &str); 5] {
    [
        ("Connection", "Upgrade"),
        ("Upgrade", "websocket"),
        ("Sec-WebSocket-Version", "13"),
        ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="),
        ("Sec-WebSocket-Protocol", protocol),
    ]
}

/// Runs a command by Exec in a session of its own, to its end; what it wrote to stdout.
///
/// # Errors
/// As the runtime answers, or the session ends before it has said how the command did.
pub async fn exec(cri: &Cri, id: &str, args: &[&str]) -> Result<Vec<u8>> {
    let request = v1::ExecRequest {
        container_id: id.into(),
        cmd: args.iter().map(|s| (*s).to_owned()).collect(),
        stdout: true,
        ..Default::default()
    };
    let url = cri.runtime.clone().exec(request).await?.into_inner().url;
    let mut session = WebSocket::open(&url).await?;
    let mut out = Vec::new();
    loop {
        match session
            .next()
            .await?
            .context("the session ended without a status")?
        {
            (1, data) => out.extend(data),
            (3, status) => {
                let status = String::from_utf8_lossy(&status).into_owned();
                if !status.contains("\"Success\"") {
                    bail!("{status}");
                }
                return Ok(out);
            }
            _ => {}
        }
    }
}

/// An open session.
pub struct WebSocket(pub TcpStream);

impl WebSocket {
    /// Opens a session.
    ///
    /// # Errors
    /// The server does not agree.
    pub async fn open(url: &str) -> Result<WebSocket> {
        let (status, stream) = request(url, &upgrade(ANY)).await?;
        if status != 101 {
            bail!("answered {status}");
        }
        Ok(WebSocket(stream))
    }

    /// Sends bytes on a channel.
    ///
    /// # Errors
    /// The connection is gone.
    pub async fn send(&mut self, channel: u8, data: &[u8]) -> Result<()> {
        let length = u16::try_from(data.len() + 1)?;
        // Masked with zeros, which is a mask.
        let mut frame = vec![0x82, 0x80 | 126];
        frame.extend(length.to_be_bytes());
        frame.extend([0, 0, 0, 0, channel]);
        frame.extend(data);
        Ok(self.0.write_all(&frame).await?)
    }

    /// The next message: its channel and its bytes; `None` when the server says goodbye or is gone.
    ///
    /// # Errors
    /// What comes is no message.
    pub async fn next(&mut self) -> Result<Option<(u8, Vec<u8>)>> {
        loop {
            let mut head = [0; 2];
            if self.0.read_exact(&mut head).await.is_err() {
                return Ok(None);
            }
            let length = match head[1] {
                126 => usize::from(self.0.read_u16().await?),
                127 => usize::try_from(self.0.read_u64().await?)?,
                short => usize::from(short),
            };
            let mut data = vec![0; length];
            self.0.read_exact(&mut data).await?;
            match head[0] {
                0x82 if !data.is_empty() => return Ok(Some((data.remove(0), data))),
                0x88 => return Ok(None),
                0x89 | 0x8a | 0x82 => {}
                other => bail!("a frame that begins with {other:#x}"),
            }
        }
    }
}

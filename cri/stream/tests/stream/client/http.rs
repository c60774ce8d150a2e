//! The HTTP before the streams, over TCP or TLS.

use std::sync::Arc;

use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;

pub trait Io: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

pub struct Response {
    pub status: u16,
    pub head: String,
    pub io: Box<dyn Io>,
}

impl Response {
    pub fn header(&self, name: &str) -> &str {
        let found = self.head.lines().find_map(|line| {
            let (key, value) = line.split_once(':')?;
            key.eq_ignore_ascii_case(name).then_some(value.trim())
        });
        found.unwrap_or_default()
    }

    /// What follows the head, until the server closes.
    pub async fn body(mut self) -> String {
        let mut body = String::new();
        self.io.read_to_string(&mut body).await.unwrap();
        body
    }
}

/// "https://host:port/path" as its parts.
pub fn split(url: &str) -> (bool, &str, &str) {
    let (scheme, rest) = url.split_once("://").unwrap();
    let (authority, path) = rest.split_once('/').unwrap();
    (scheme == "https", authority, path)
}

pub async fn connect(url: &str, trust: Option<Arc<rustls::ClientConfig>>) -> Box<dyn Io> {
    let (tls, authority, _) = split(url);
    let stream = TcpStream::connect(authority).await.unwrap();
    stream.set_nodelay(true).unwrap();
    if !tls {
        return Box::new(stream);
    }
    let connector = tokio_rustls::TlsConnector::from(trust.expect("trust for https"));
    Box::new(
        connector
            .connect(ServerName::try_from("localhost").unwrap(), stream)
            .await
            .unwrap(),
    )
}

pub async fn request(url: &str, method: &str, headers: &[(&str, &str)]) -> Response {
    request_on(connect(url, None).await, url, method, headers).await
}

pub async fn request_on(mut io: Box<dyn Io>, url: &str, method: &str, headers: &[(&str, &str)]) -> Response {
    let (_, authority, path) = split(url);
    let mut head = format!("{method} /{path} HTTP/1.1\r\nHost: {authority}\r\n");
    for (name, value) in headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    head.push_str("\r\n");
    io.write_all(head.as_bytes()).await.unwrap();
    io.flush().await.unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(io.read_u8().await.expect("a whole head"));
    }
    let head = String::from_utf8(head).unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    Response { status, head, io }
}

pub async fn spdy(io: Box<dyn Io>, url: &str, protocol: &str) -> Response {
    let headers = [
        ("Connection", "Upgrade"),
        ("Upgrade", "SPDY/3.1"),
        ("X-Stream-Protocol-Version", protocol),
    ];
    request_on(io, url, "POST", &headers).await
}

pub async fn websocket(io: Box<dyn Io>, url: &str, protocol: &str) -> Response {
    let headers = [
        ("Connection", "keep-alive, Upgrade"),
        ("Upgrade", "websocket"),
        ("Sec-WebSocket-Version", "13"),
        ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="),
        ("Sec-WebSocket-Protocol", protocol),
    ];
    request_on(io, url, "GET", &headers).await
}

//! A registry that says what a test wants it to say, and remembers what it was asked.

use super::image::Made;
use slipway_image::Digest;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// A request as it came.
#[derive(Clone, Debug)]
pub struct Seen {
    pub method: String,
    pub path: String,
    pub query: String,
    pub headers: BTreeMap<String, String>,
    pub body: Vec<u8>,
}

impl Seen {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }

    pub fn is_blob(&self, digest: &Digest) -> bool {
        self.method == "GET" && self.path.ends_with(&format!("/blobs/{digest}"))
    }

    /// `bytes=a-` or `bytes=a-b`.
    pub fn range(&self) -> Option<(usize, Option<usize>)> {
        let (from, to) = self.header("range")?.strip_prefix("bytes=")?.split_once('-')?;
        Some((from.parse().unwrap(), to.parse().ok()))
    }
}

/// An answer, and in which way it goes wrong.
#[derive(Clone, Default)]
pub struct Reply {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
    /// The connection ends after so many bytes of the body.
    pub cut: Option<usize>,
    /// Nothing comes for so long, after the head and half of the body.
    pub stall: Option<Duration>,
    /// The body comes in pieces of so many bytes, with pauses between.
    pub drip: Option<(usize, Duration)>,
}

impl Reply {
    pub fn new(status: u16) -> Reply {
        Reply {
            status,
            ..Reply::default()
        }
    }

    pub fn body(mut self, body: impl Into<Vec<u8>>) -> Reply {
        self.body = body.into();
        self
    }

    pub fn header(mut self, name: &str, value: impl Into<String>) -> Reply {
        self.headers.push((name.to_owned(), value.into()));
        self
    }

    pub fn cut(mut self, at: usize) -> Reply {
        self.cut = Some(at);
        self
    }

    /// A redirect to a URL.
    pub fn to(url: impl Into<String>) -> Reply {
        Reply::new(307).header("location", url)
    }
}

type Handler = dyn Fn(&Seen, usize) -> Reply + Send + Sync;

pub struct Fake {
    pub host: String,
    seen: Arc<Mutex<Vec<Seen>>>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Fake {
    /// Serves what the handler says; it is told how often the same method and path came before.
    pub async fn start(handler: impl Fn(&Seen, usize) -> Reply + Send + Sync + 'static) -> Fake {
        Fake::start_at("127.0.0.1:0", handler).await
    }

    /// As [`Fake::start`], on an address.
    pub async fn start_at(
        address: &str,
        handler: impl Fn(&Seen, usize) -> Reply + Send + Sync + 'static,
    ) -> Fake {
        let listener = TcpListener::bind(address).await.unwrap();
        let host = listener.local_addr().unwrap().to_string();
        let seen: Arc<Mutex<Vec<Seen>>> = Arc::default();
        let handler: Arc<Handler> = Arc::new(handler);
        let kept = Arc::clone(&seen);
        let task = tokio::spawn(async move {
            loop {
                let Ok((stream, _)) = listener.accept().await else {
                    return;
                };
                tokio::spawn(serve(stream, Arc::clone(&handler), Arc::clone(&kept)));
            }
        });
        Fake { host, seen, task }
    }

    pub fn reference(&self, rest: &str) -> slipway_image::Reference {
        slipway_image::Reference::parse(&format!("{}/{rest}", self.host)).unwrap()
    }

    pub fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }

    pub fn count(&self, is: impl Fn(&Seen) -> bool) -> usize {
        self.seen().iter().filter(|seen| is(seen)).count()
    }
}

async fn serve(mut stream: TcpStream, handler: Arc<Handler>, kept: Arc<Mutex<Vec<Seen>>>) {
    let mut buffer = Vec::new();
    loop {
        let Some(seen) = read(&mut stream, &mut buffer).await else {
            return;
        };
        let before = {
            let mut kept = kept.lock().unwrap();
            let same = |other: &&Seen| other.method == seen.method && other.path == seen.path;
            let before = kept.iter().filter(same).count();
            kept.push(seen.clone());
            before
        };
        let reply = handler(&seen, before);
        if answer(&mut stream, &seen, reply).await.is_none() {
            return;
        }
    }
}

async fn read(stream: &mut TcpStream, buffer: &mut Vec<u8>) -> Option<Seen> {
    let end = loop {
        if let Some(at) = buffer.windows(4).position(|w| w == b"\r\n\r\n") {
            break at;
        }
        if stream.read_buf(buffer).await.ok()? == 0 {
            return None;
        }
    };
    let head = String::from_utf8(buffer[..end].to_vec()).ok()?;
    buffer.drain(..end + 4);
    let mut lines = head.lines();
    let mut words = lines.next()?.split(' ');
    let (method, target) = (words.next()?.to_owned(), words.next()?.to_owned());
    let (path, query) = target.split_once('?').unwrap_or((&target, ""));
    let headers: BTreeMap<String, String> = lines
        .filter_map(|line| line.split_once(':'))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()))
        .collect();
    let length = headers
        .get("content-length")
        .and_then(|text| text.parse().ok())
        .unwrap_or(0);
    while buffer.len() < length {
        if stream.read_buf(buffer).await.ok()? == 0 {
            return None;
        }
    }
    let body = buffer.drain(..length).collect();
    Some(Seen {
        method,
        path: path.to_owned(),
        query: query.to_owned(),
        headers,
        body,
    })
}

async fn answer(stream: &mut TcpStream, seen: &Seen, reply: Reply) -> Option<()> {
    let mut head = format!(
        "HTTP/1.1 {} X\r\ncontent-length: {}\r\n",
        reply.status,
        reply.body.len()
    );
    for (name, value) in &reply.headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    head.push_str("\r\n");
    stream.write_all(head.as_bytes()).await.ok()?;
    if seen.method == "HEAD" {
        return Some(());
    }
    let end = reply.cut.unwrap_or(reply.body.len()).min(reply.body.len());
    if let Some((piece, pause)) = reply.drip {
        for bytes in reply.body[..end].chunks(piece) {
            stream.write_all(bytes).await.ok()?;
            stream.flush().await.ok()?;
            tokio::time::sleep(pause).await;
        }
        return Some(());
    }
    let half = end / 2;
    stream.write_all(&reply.body[..half]).await.ok()?;
    if let Some(stall) = reply.stall {
        tokio::time::sleep(stall).await;
    }
    stream.write_all(&reply.body[half..end]).await.ok()?;
    stream.flush().await.ok()?;
    if reply.cut.is_some() {
        let _ = stream.shutdown().await;
        return None;
    }
    Some(())
}

/// What a well-behaved registry answers that has these images under their tags (`repository:tag`).
pub fn well(images: &[(&str, &Made)]) -> impl Fn(&Seen) -> Reply + Send + Sync + use<> {
    let images: Vec<(String, Made)> = images
        .iter()
        .map(|(name, made)| ((*name).to_owned(), (*made).clone()))
        .collect();
    move |seen| {
        let found = images.iter().find_map(|(name, image)| {
            let (repository, tag) = name.split_once(':').unwrap();
            let rest = seen.path.strip_prefix(&format!("/v2/{repository}/"))?;
            if let Some(target) = rest.strip_prefix("manifests/") {
                let here = target == tag || target == image.digest.to_string();
                return here.then(|| {
                    Reply::new(200)
                        .header("content-type", &*image.media_type)
                        .header("docker-content-digest", image.digest.to_string())
                        .body(image.manifest.clone())
                });
            }
            let digest = rest.strip_prefix("blobs/")?;
            if digest == Digest::of(&image.config).to_string() {
                return Some(Reply::new(200).body(image.config.clone()));
            }
            let blob = image
                .layers
                .iter()
                .find(|layer| layer.digest.to_string() == digest)?;
            Some(ranged(seen, &blob.bytes))
        });
        found.unwrap_or_else(|| {
            Reply::new(404).body(r#"{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest unknown"}]}"#)
        })
    }
}

/// A body, or the part of it that was asked for.
pub fn ranged(seen: &Seen, body: &[u8]) -> Reply {
    match seen.range() {
        None => Reply::new(200).header("accept-ranges", "bytes").body(body),
        Some((from, to)) => {
            let end = to.map_or(body.len(), |to| (to + 1).min(body.len()));
            let range = format!("bytes {from}-{}/{}", end - 1, body.len());
            Reply::new(206)
                .header("content-range", range)
                .body(&body[from..end])
        }
    }
}

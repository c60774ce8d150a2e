//! One blob into a repository: is it there, can it be mounted, else in one piece or in chunks, resumed where it broke.
//!
//! Follows the distribution spec, "Pushing Blobs". Refuses to know images.

use crate::digest::Digest;
use crate::registry::client::{Place, Session};
use crate::registry::failure::Failure;
use crate::registry::transport::{Answer, Payload, Request, location};
use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::{self, BoxStream};
use reqwest::header::{CONTENT_RANGE, CONTENT_TYPE, HeaderName, HeaderValue};
use reqwest::{Body, Method};
use std::io::{self, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::io::AsyncReadExt;
use tokio_util::io::ReaderStream;
use url::Url;

/// Up to this length a blob is sent with one request.
const ONE_PIECE: u64 = 16 << 20;
/// How long a chunk is, where the registry does not want longer ones.
const CHUNK: u64 = 64 << 20;
/// What is read of a file at a time.
const READ: usize = 256 << 10;
/// How much longer than for a piece of an answer we wait for a registry that has all bytes and digests them.
const PATIENCE: u32 = 5;

/// A blob to be sent.
#[derive(Clone, Debug)]
pub(crate) enum Blob {
    Bytes(Bytes),
    File(PathBuf),
}

/// How a blob is in the repository without being sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Arrival {
    Existed,
    Mounted { from: String },
}

/// Sends blobs to one repository at one place.
pub(crate) struct Uploader<'a> {
    pub session: &'a Session,
    pub place: &'a Place,
}

/// An upload that the registry has opened.
struct Opened {
    url: Url,
    /// The registry wants chunks at least this long.
    least: u64,
}

impl<'a> Uploader<'a> {
    /// Whether the repository has the blob.
    pub async fn exists(&self, digest: &Digest) -> Result<bool, Failure> {
        let url = self.session.url(&self.place.endpoint, &format!("blobs/{digest}"));
        let what = format!("blob {digest}");
        match self
            .session
            .call_patiently(self.place, &what, &Request::new(Method::HEAD, url))
            .await
        {
            Ok(_) => Ok(true),
            Err(Failure::NotFound { .. }) => Ok(false),
            // Some registries answer HEAD of a blob that they do not know with this.
            Err(Failure::Status {
                status: 400 | 405, ..
            }) => Ok(false),
            Err(failure) => Err(failure),
        }
    }

    /// Has the registry take the blob from another repository of its own; `false` when it will not.
    pub async fn mount(&self, digest: &Digest, from: &str) -> Result<bool, Failure> {
        let mut url = self.session.url(&self.place.endpoint, "blobs/uploads/");
        url.query_pairs_mut()
            .append_pair("mount", &digest.to_string())
            .append_pair("from", from);
        let mut scopes = self.session.scopes();
        scopes.push(format!("repository:{from}:pull"));
        match self
            .session
            .call(self.place, &Request::new(Method::POST, url.clone()), &scopes)
            .await
        {
            Ok(answer) if answer.status().as_u16() == 201 => Ok(true),
            Ok(answer) => {
                // It opened an upload instead, which nobody will use.
                if let Ok(url) = location(&answer, &url) {
                    let cancel = Request::new(Method::DELETE, url);
                    let _ = self
                        .session
                        .call(self.place, &cancel, &self.session.scopes())
                        .await;
                }
                Ok(false)
            }
            Err(failure) if failure.is_unreachable() => Err(failure),
            // Not allowed to read there, or not known: then it is sent.
            Err(_) => Ok(false),
        }
    }

    /// Sends a blob whose digest and size are known.
    pub async fn send(
        &self,
        blob: &Blob,
        digest: &Digest,
        size: u64,
        sent: &Arc<AtomicU64>,
    ) -> Result<(), Failure> {
        let what = format!("blob {digest}");
        let mut backoff = self.session.backoff();
        let mut in_chunks = size > ONE_PIECE;
        loop {
            sent.store(0, Ordering::Relaxed);
            let opened = self.open(&what).await?;
            let result = match in_chunks {
                true => self.chunks(opened, blob, digest, size, sent).await,
                false => self.one_piece(opened.url, blob, digest, size, sent).await,
            };
            match result {
                Ok(()) => return Ok(()),
                // A registry that cannot take chunks takes one piece.
                Err(Failure::Status {
                    status: 400 | 405 | 411 | 413 | 416 | 501,
                    ..
                }) if in_chunks => {
                    in_chunks = false;
                }
                Err(Failure::NotFound { .. }) if in_chunks => in_chunks = false,
                Err(failure) => self.session.pause(&mut backoff, &what, failure).await?,
            }
        }
    }

    /// Sends a blob while it is being made: its length is not known, and its digest only when `digest` says so.
    pub async fn send_stream(
        &self,
        pieces: BoxStream<'static, io::Result<Bytes>>,
        digest: impl Future<Output = Option<Digest>>,
        sent: &Arc<AtomicU64>,
    ) -> Result<(), Failure> {
        let opened = self.open("a layer").await?;
        let counter = Arc::clone(sent);
        let counted = pieces.inspect(move |piece| {
            if let Ok(bytes) = piece {
                counter.fetch_add(bytes.len() as u64, Ordering::Relaxed);
            }
        });
        // It can be sent once only: who fails here sends the finished blob anew.
        let once = std::sync::Mutex::new(Some(Body::wrap_stream(counted)));
        let body = move || {
            let taken = once
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner)
                .take();
            taken.unwrap_or_else(|| {
                Body::wrap_stream(stream::iter([Err::<Bytes, _>(io::Error::other("sent already"))]))
            })
        };
        let mut request = Request::new(Method::PATCH, opened.url.clone());
        request.headers.insert(CONTENT_TYPE, octets());
        request.payload = Payload::Stream(None, Box::new(body));
        let answer = self.watched(&request, sent).await?;
        let url = location(&answer, &opened.url)?;
        let digest = digest.await.ok_or_else(|| Failure::Cut {
            host: self.place.endpoint.host.clone(),
            detail: "the layer could not be made".to_owned(),
        })?;
        self.close(&url, &digest).await
    }

    async fn open(&self, what: &str) -> Result<Opened, Failure> {
        let url = self.session.url(&self.place.endpoint, "blobs/uploads/");
        let request = Request::new(Method::POST, url.clone());
        let answer = self.session.call_patiently(self.place, what, &request).await?;
        let least = answer
            .header("oci-chunk-min-length")
            .and_then(|text| text.parse().ok());
        Ok(Opened {
            url: location(&answer, &url)?,
            least: least.unwrap_or(0),
        })
    }

    async fn one_piece(
        &self,
        url: Url,
        blob: &Blob,
        digest: &Digest,
        size: u64,
        sent: &Arc<AtomicU64>,
    ) -> Result<(), Failure> {
        let mut request = Request::new(Method::PUT, with_digest(url, digest));
        request.headers.insert(CONTENT_TYPE, octets());
        request.payload = blob.payload(0, size, sent);
        self.watched(&request, sent).await.map(drop)
    }

    async fn chunks(
        &self,
        opened: Opened,
        blob: &Blob,
        digest: &Digest,
        size: u64,
        sent: &Arc<AtomicU64>,
    ) -> Result<(), Failure> {
        let (mut url, mut from) = (opened.url, 0);
        let chunk = CHUNK.max(opened.least);
        let mut backoff = self.session.backoff();
        while from < size {
            let until = (from + chunk).min(size);
            match self.chunk(&url, blob, from, until, sent).await {
                Ok(answer) => {
                    // What it has is what counts; most have all of it.
                    from = offset(&answer)
                        .filter(|at| *at > from && *at <= until)
                        .unwrap_or(until);
                    url = location(&answer, &url)?;
                    backoff.progressed();
                }
                Err(failure) => {
                    self.session
                        .pause(&mut backoff, &format!("blob {digest}"), failure)
                        .await?;
                    let (at, next) = self.progress_of(&url).await?;
                    if at > from {
                        backoff.progressed();
                    }
                    (from, url) = (at.min(size), next);
                }
            }
            sent.store(from, Ordering::Relaxed);
        }
        self.close(&url, digest).await
    }

    async fn chunk(
        &self,
        url: &Url,
        blob: &Blob,
        from: u64,
        until: u64,
        sent: &Arc<AtomicU64>,
    ) -> Result<Answer, Failure> {
        let mut request = Request::new(Method::PATCH, url.clone());
        request.headers.insert(CONTENT_TYPE, octets());
        if let Ok(range) = HeaderValue::from_str(&format!("{from}-{}", until - 1)) {
            request.headers.insert(CONTENT_RANGE, range);
        }
        request.payload = blob.payload(from, until, sent);
        self.watched(&request, sent).await
    }

    /// How far an upload has come, and where it goes on.
    async fn progress_of(&self, url: &Url) -> Result<(u64, Url), Failure> {
        let request = Request::new(Method::GET, url.clone());
        let answer = self
            .session
            .call_patiently(self.place, "an upload", &request)
            .await?;
        let next = location(&answer, url).unwrap_or_else(|_| url.clone());
        Ok((offset(&answer).unwrap_or(0), next))
    }

    /// The last request of an upload in chunks.
    async fn close(&self, url: &Url, digest: &Digest) -> Result<(), Failure> {
        let request = Request::new(Method::PUT, with_digest(url.clone(), digest));
        // Whatever fails here: if the blob is there, it was not a failure.
        match self.watched(&request, &Arc::default()).await {
            Ok(_) => Ok(()),
            Err(failure) if failure.is_transient() && self.exists(digest).await? => Ok(()),
            Err(failure) => Err(failure),
        }
    }

    /// A request whose body takes as long as it takes, if only it moves.
    async fn watched(&self, request: &Request, sent: &Arc<AtomicU64>) -> Result<Answer, Failure> {
        let scopes = self.session.scopes();
        let mut call = std::pin::pin!(self.session.call(self.place, request, &scopes));
        let patience: Duration = self.session.registry.config.read_timeout * PATIENCE;
        loop {
            let before = sent.load(Ordering::Relaxed);
            match tokio::time::timeout(patience, &mut call).await {
                Ok(result) => return result,
                Err(_) if sent.load(Ordering::Relaxed) != before => {}
                Err(_) => {
                    let detail = format!("nothing moved for {} s", patience.as_secs());
                    return Err(Failure::Cut {
                        host: self.place.endpoint.host.clone(),
                        detail,
                    });
                }
            }
        }
    }
}

impl Blob {
    /// Bytes `from..until`, counted while they are sent.
    fn payload(&self, from: u64, until: u64, sent: &Arc<AtomicU64>) -> Payload {
        let sent = Arc::clone(sent);
        match self {
            Blob::Bytes(bytes) => {
                sent.store(until, Ordering::Relaxed);
                // Small blobs are sent whole.
                Payload::Bytes(bytes.clone())
            }
            Blob::File(path) => {
                let path = path.clone();
                let make = move || {
                    sent.store(from, Ordering::Relaxed);
                    let counter = Arc::clone(&sent);
                    let counted = section(&path, from, until - from).inspect(move |piece| {
                        if let Ok(bytes) = piece {
                            counter.fetch_add(bytes.len() as u64, Ordering::Relaxed);
                        }
                    });
                    Body::wrap_stream(counted)
                };
                Payload::Stream(Some(until - from), Box::new(make))
            }
        }
    }
}

/// A part of a file.
fn section(path: &Path, from: u64, length: u64) -> BoxStream<'static, io::Result<Bytes>> {
    let open = || {
        let mut file = std::fs::File::open(path)?;
        file.seek(SeekFrom::Start(from))?;
        Ok::<_, io::Error>(file)
    };
    match open() {
        Ok(file) => {
            let file = tokio::fs::File::from_std(file).take(length);
            ReaderStream::with_capacity(file, READ).boxed()
        }
        Err(error) => stream::iter([Err(error)]).boxed(),
    }
}

fn with_digest(mut url: Url, digest: &Digest) -> Url {
    url.query_pairs_mut().append_pair("digest", &digest.to_string());
    url
}

fn octets() -> HeaderValue {
    HeaderValue::from_static("application/octet-stream")
}

/// `Range: 0-99`, or docker's `bytes=0-99`: a hundred bytes are there. `0-0` of an upload that has none is how
/// registries that cannot say "nothing" say it, so one byte is never believed.
fn offset(answer: &Answer) -> Option<u64> {
    let name = HeaderName::from_static("range");
    let text = answer.header(name.as_str())?;
    let last: u64 = text
        .trim()
        .trim_start_matches("bytes=")
        .split_once('-')?
        .1
        .trim()
        .parse()
        .ok()?;
    Some(if last == 0 { 0 } else { last + 1 })
}

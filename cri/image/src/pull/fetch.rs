//! One blob over the wire: from the first place that has it, resumed where it broke, in ranges where that helps.
//!
//! The bytes go into a [`Sink`] in order. Refuses to know what becomes of them, and checks no digest: only whoever
//! has seen all bytes can.

use crate::digest::Digest;
use crate::progress::ProgressEvent;
use crate::registry::client::{Place, Session};
use crate::registry::failure::Failure;
use crate::registry::retry::Backoff;
use crate::registry::transport::{Answer, Pace, same_origin};
use bytes::Bytes;
use futures_util::StreamExt;
use oci_spec::image::Descriptor;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use url::Url;

/// Ranges of one blob at a time.
const RANGES_AT_ONCE: usize = 4;

/// An attempt that brings so much is not counted among those that a blob may take altogether.
const WORTH_AN_ATTEMPT: u64 = 256 << 10;

/// Where a blob's bytes go.
pub(crate) struct Sink {
    pub pieces: mpsc::Sender<Piece>,
    pub done: Arc<AtomicU64>,
}

/// What goes into a sink.
pub(crate) enum Piece {
    Bytes(Bytes),
    /// All bytes were sent.
    End,
}

/// Why no more bytes come.
pub(crate) enum Stop {
    Failure(Failure),
    /// Who takes the bytes has gone, and knows why.
    SinkGone,
}

impl From<Failure> for Stop {
    fn from(failure: Failure) -> Stop {
        Stop::Failure(failure)
    }
}

/// One blob being fetched.
pub(crate) struct Fetch<'a> {
    session: &'a Session,
    digest: Digest,
    size: u64,
    urls: Vec<Url>,
    what: String,
    sink: Sink,
    got: u64,
    /// How long bytes of this attempt were waited for.
    waited: Duration,
    /// Who gave bytes: if their digest is wrong, one of these lies.
    pub hosts: Vec<String>,
}

impl<'a> Fetch<'a> {
    pub fn new(session: &'a Session, descriptor: &Descriptor, digest: Digest, sink: Sink) -> Fetch<'a> {
        let media_type = descriptor.media_type().to_string();
        let foreign = media_type.contains("foreign") || media_type.contains("nondistributable");
        let urls = descriptor.urls().iter().flatten().take(8).filter(|_| foreign);
        let urls = urls.filter_map(|url| Url::parse(url).ok());
        Fetch {
            session,
            digest,
            size: descriptor.size(),
            urls: urls
                .filter(|url| matches!(url.scheme(), "http" | "https") && url.has_host())
                .collect(),
            what: format!("layer {digest}"),
            sink,
            got: 0,
            waited: Duration::ZERO,
            hosts: Vec::new(),
        }
    }

    /// Fetches all of it: from the registry's places in order, then from the URLs of a foreign layer.
    pub async fn run(&mut self) -> Result<(), Stop> {
        let session = self.session;
        let mut last = session.nowhere();
        for place in session.places(|endpoint| endpoint.pull) {
            match self.from(Origin::Place(place)).await {
                Ok(()) => return self.end().await,
                Err(Stop::Failure(failure)) => last = session.passed(place, failure),
                Err(gone) => return Err(gone),
            }
        }
        for url in std::mem::take(&mut self.urls) {
            match self.from(Origin::Foreign(&url)).await {
                Ok(()) => return self.end().await,
                Err(Stop::Failure(failure)) => last = failure,
                Err(gone) => return Err(gone),
            }
        }
        Err(Stop::Failure(last))
    }

    async fn end(&mut self) -> Result<(), Stop> {
        self.sink
            .pieces
            .send(Piece::End)
            .await
            .map_err(|_| Stop::SinkGone)
    }

    /// Fetches what is missing from one origin, trying again while it makes progress.
    async fn from(&mut self, origin: Origin<'_>) -> Result<(), Stop> {
        let mut backoff = self.session.backoff();
        loop {
            let before = self.got;
            self.waited = Duration::ZERO;
            let failure = match self.attempt(origin).await {
                Ok(host) if self.got < self.size => Failure::Cut {
                    host,
                    detail: format!("it ended after {} of {} bytes", self.got, self.size),
                },
                Ok(_) => return Ok(()),
                // What it has is shorter than it should be, whoever asks.
                Err(Stop::Failure(Failure::Status {
                    host, status: 416, ..
                })) if self.got > 0 => {
                    let detail = format!("it ended after {} of {} bytes", self.got, self.size);
                    return Err(Failure::Corrupt { host, detail }.into());
                }
                Err(Stop::Failure(failure)) => failure,
                Err(gone) => return Err(gone),
            };
            judge(self.session, &mut backoff, self.got - before, self.waited);
            self.session.pause(&mut backoff, &self.what, failure).await?;
        }
    }

    async fn attempt(&mut self, origin: Origin<'_>) -> Result<String, Stop> {
        let config = &self.session.registry.config;
        let rest = self.size - self.got;
        match origin {
            Origin::Place(place) if rest >= config.range_threshold && rest > config.range_chunk => {
                self.in_ranges(place).await
            }
            Origin::Place(place) => {
                let range = (self.got > 0).then_some((self.got, None));
                let answer = self.session.open_blob(place, &self.digest, range, None).await?;
                self.note(&place.endpoint.host);
                self.pour(answer, self.size).await
            }
            Origin::Foreign(url) => {
                let answer = self.session.open_foreign(url, self.got).await?;
                let host = answer.host.clone();
                self.note(&host);
                self.pour(answer, self.size).await
            }
        }
    }

    fn note(&mut self, host: &str) {
        if !self.hosts.iter().any(|known| known == host) {
            self.hosts.push(host.to_owned());
        }
    }

    /// The first range shows whether the server can do ranges, and how fast it is: a fast one sends the rest in
    /// one piece, a slow one in several at a time (many limit each connection, none all of them together).
    async fn in_ranges(&mut self, place: &Place) -> Result<String, Stop> {
        let config = &self.session.registry.config;
        let chunk = config.range_chunk.max(1);
        let until = self.got + chunk;
        let range = Some((self.got, Some(until - 1)));
        let answer = self.session.open_blob(place, &self.digest, range, None).await?;
        self.note(&place.endpoint.host);
        if answer.status().as_u16() != 206 {
            return self.pour(answer, self.size).await;
        }
        let (host, url) = (answer.host.clone(), answer.url.clone());
        let begun = Instant::now();
        self.pour(answer, until).await?;
        if self.got < until {
            return Ok(host);
        }
        let rate = chunk as f64 / begun.elapsed().as_secs_f64().max(1e-6);
        if rate >= config.fast_enough as f64 {
            let range = Some((self.got, None));
            let answer = self.session.open_blob(place, &self.digest, range, None).await?;
            return self.pour(answer, self.size).await;
        }
        let elsewhere = (!same_origin(&url, &place.endpoint.base)).then_some(&url);
        self.ranges_at_once(place, elsewhere, chunk).await?;
        Ok(host)
    }

    async fn ranges_at_once(&mut self, place: &Place, hint: Option<&Url>, chunk: u64) -> Result<(), Stop> {
        let (session, digest, size, from) = (self.session, self.digest, self.size, self.got);
        let starts = (0..)
            .map(move |n| from + n * chunk)
            .take_while(move |start| *start < size);
        let fetches = starts.map(|start| {
            let end = (start + chunk).min(size);
            fetch_range(session, place, digest, size, start..end, hint)
        });
        let mut ranges = std::pin::pin!(futures_util::stream::iter(fetches).buffered(RANGES_AT_ONCE));
        while let Some(range) = ranges.next().await {
            let (pieces, _slot) = range?;
            for bytes in pieces {
                self.send(bytes).await?;
            }
        }
        Ok(())
    }

    /// Lets an answer's body flow into the sink, up to a byte; who answered.
    async fn pour(&mut self, mut answer: Answer, until: u64) -> Result<String, Stop> {
        let mut skip = start_of(&answer, self.got, self.size)?;
        let corrupt = |host: &str, size: u64| Failure::Corrupt {
            host: host.to_owned(),
            detail: format!("it is longer than the {size} bytes that its descriptor says"),
        };
        loop {
            let begun = Instant::now();
            let chunk = answer.chunk().await;
            self.waited += begun.elapsed();
            let Some(mut bytes) = chunk? else { break };
            let skipped = skip.min(bytes.len() as u64);
            skip -= skipped;
            // At most the length of the piece.
            let _ = bytes.split_to(skipped as usize);
            if self.got + bytes.len() as u64 > until {
                return Err(Stop::Failure(corrupt(&answer.host, self.size)));
            }
            if !bytes.is_empty() {
                self.send(bytes).await?;
            }
        }
        Ok(answer.host)
    }

    async fn send(&mut self, bytes: Bytes) -> Result<(), Stop> {
        let length = bytes.len() as u64;
        self.sink
            .pieces
            .send(Piece::Bytes(bytes))
            .await
            .map_err(|_| Stop::SinkGone)?;
        self.got += length;
        self.sink.done.store(self.got, Ordering::Relaxed);
        Ok(())
    }
}

/// What an attempt that failed has brought: a drip is no progress, and much of it is worth another attempt.
fn judge(session: &Session, backoff: &mut Backoff, bytes: u64, waited: Duration) {
    if Pace::new(&session.registry.config).is_progress(waited, bytes) {
        backoff.progressed();
    }
    if bytes >= WORTH_AN_ATTEMPT {
        backoff.earned();
    }
}

#[derive(Clone, Copy)]
enum Origin<'a> {
    Place(&'a Place),
    Foreign(&'a Url),
}

/// How many bytes of the body come before the one that was asked for: none of a partial answer, all of them of a
/// server that does not know ranges.
fn start_of(answer: &Answer, wanted: u64, size: u64) -> Result<u64, Failure> {
    if answer.status().as_u16() != 206 {
        return Ok(wanted);
    }
    let protocol = |detail: String| Failure::Protocol {
        host: answer.host.clone(),
        detail,
    };
    let range = answer.header("content-range").and_then(content_range);
    let Some((start, total)) = range else {
        return Err(protocol("a part came without saying which".to_owned()));
    };
    if start != wanted {
        return Err(protocol(format!("byte {wanted} was asked for, {start} came")));
    }
    match total.filter(|total| *total != size) {
        Some(total) => Err(Failure::Corrupt {
            host: answer.host.clone(),
            detail: format!("it has {total} bytes, its descriptor says {size}"),
        }),
        None => Ok(0),
    }
}

/// `bytes 5-9/10` or `bytes 5-9/*`: the first byte and the whole length.
fn content_range(text: &str) -> Option<(u64, Option<u64>)> {
    let (range, total) = text.trim().strip_prefix("bytes ")?.split_once('/')?;
    let start = range.trim().split_once('-')?.0.parse().ok()?;
    Some((start, total.trim().parse().ok()))
}

/// One range, whole and in memory; the slot bounds how many there are.
async fn fetch_range(
    session: &Session,
    place: &Place,
    digest: Digest,
    size: u64,
    range: std::ops::Range<u64>,
    hint: Option<&Url>,
) -> Result<(Vec<Bytes>, Option<(OwnedSemaphorePermit, OwnedSemaphorePermit)>), Stop> {
    // The semaphore is never closed.
    let own = Arc::clone(&session.range_slots).acquire_owned().await.ok();
    let all = Arc::clone(&session.registry.range_slots)
        .acquire_owned()
        .await
        .ok();
    let slot = own.zip(all);
    let mut backoff = session.backoff();
    let (mut got, mut pieces) = (range.start, Vec::new());
    loop {
        let (before, begun) = (got, Instant::now());
        let failure = match one_range(
            session,
            place,
            digest,
            size,
            (&mut got, range.end),
            hint,
            &mut pieces,
        )
        .await
        {
            Ok(()) if got == range.end => return Ok((pieces, slot)),
            Ok(()) => Failure::Cut {
                host: place.endpoint.host.clone(),
                detail: format!("a range ended {} bytes early", range.end - got),
            },
            Err(failure) => failure,
        };
        judge(session, &mut backoff, got - before, begun.elapsed());
        session
            .pause(&mut backoff, &format!("layer {digest}"), failure)
            .await?;
    }
}

async fn one_range(
    session: &Session,
    place: &Place,
    digest: Digest,
    size: u64,
    (got, end): (&mut u64, u64),
    hint: Option<&Url>,
    pieces: &mut Vec<Bytes>,
) -> Result<(), Failure> {
    let mut answer = session
        .open_blob(place, &digest, Some((*got, Some(end - 1))), hint)
        .await?;
    if answer.status().as_u16() != 206 {
        let detail = "it stopped answering with parts".to_owned();
        return Err(Failure::Protocol {
            host: answer.host,
            detail,
        });
    }
    start_of(&answer, *got, size)?;
    while let Some(bytes) = answer.chunk().await? {
        if *got + bytes.len() as u64 > end {
            let detail = "a part is longer than it should be".to_owned();
            return Err(Failure::Protocol {
                host: answer.host,
                detail,
            });
        }
        *got += bytes.len() as u64;
        pieces.push(bytes);
    }
    Ok(())
}

/// A small blob, whole and checked: a configuration.
pub(crate) async fn fetch_small(
    session: &Session,
    descriptor: &Descriptor,
    digest: Digest,
    limit: usize,
) -> Result<Vec<u8>, Failure> {
    if descriptor.size() > limit as u64 {
        let detail = format!(
            "its descriptor says {} bytes, at most {limit} are read",
            descriptor.size()
        );
        return Err(Failure::Protocol {
            host: session.reference.registry().to_owned(),
            detail,
        });
    }
    let mut last = session.nowhere();
    for place in session.places(|endpoint| endpoint.pull) {
        let mut backoff = session.backoff();
        let host = place.endpoint.host.clone();
        let body = loop {
            let attempt = async {
                let answer = session.open_blob(place, &digest, None, None).await?;
                answer.body(limit).await
            };
            match attempt.await {
                Ok(body) => break Ok(body),
                Err(failure) => {
                    if let Err(failure) = session.pause(&mut backoff, "the configuration", failure).await {
                        break Err(failure);
                    }
                }
            }
        };
        last = match body {
            Ok(body) if Digest::of(&body) == digest => return Ok(body),
            Ok(body) => Failure::Corrupt {
                host,
                detail: format!("its digest is {}, expected {digest}", Digest::of(&body)),
            },
            Err(failure) => failure,
        };
    }
    Err(last)
}

/// An event of a layer's bytes.
pub(crate) fn downloaded(layer: Digest, done: u64, total: u64) -> ProgressEvent {
    ProgressEvent::Downloaded { layer, done, total }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_ranges_are_read() {
        assert_eq!(content_range("bytes 5-9/10"), Some((5, Some(10))));
        assert_eq!(content_range("bytes 0-0/*"), Some((0, None)));
        assert_eq!(content_range("bytes */10"), None);
        assert_eq!(content_range("5-9/10"), None);
    }
}

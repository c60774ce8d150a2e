//! Port-forward: pairs the streams a client opens, and has the runtime connect each pair with its port.
//!
//! Each forwarded connection is two streams of one request id: `data` both ways, and `error`, on which the client learns
//! why there was no connection. Any number of them come and go in a session, which lasts until the client leaves.

use std::collections::VecDeque;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use tokio::io::AsyncWriteExt as _;
use tokio::time::{Instant, sleep_until};

use super::Session;
use crate::mux::{Headers, Input, Mux, Opened, Output, Refusal, StreamId};
use crate::runtime::{Forward, Runtime};
use crate::status::chain;

/// How many connections are forwarded at once in one session.
const MAX_FORWARDS: usize = 256;

/// What a stream is, by its headers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Data,
    Error,
}

/// Half a pair, or both.
struct Pair {
    request: String,
    port: u16,
    deadline: Instant,
    data: Option<(StreamId, Input, Output)>,
    error: Option<(StreamId, Output)>,
}

/// The pairs of which one stream is missing, oldest first.
#[derive(Default)]
struct Pairs(VecDeque<Pair>);

/// Serves one client's port-forward session.
pub(super) async fn serve<R: Runtime>(session: &Session<'_, R>, mux: &Mux, pod: &str) {
    let mut pairs = Pairs::default();
    let mut forwards = FuturesUnordered::new();
    loop {
        let oldest = pairs.0.front().map(|pair| pair.deadline);
        tokio::select! {
            opened = mux.next() => match opened {
                None => break,
                Some(opened) => {
                    let deadline = Instant::now() + session.config.creation_timeout;
                    let full = forwards.len() + pairs.0.len() >= MAX_FORWARDS;
                    if let Some(pair) = pairs.add(mux, &opened, deadline, full) {
                        forwards.push(forward(session, mux, pod, pair));
                    }
                }
            },
            Some(()) = forwards.next(), if !forwards.is_empty() => {}
            () = sleep_until(oldest.unwrap_or_else(Instant::now)), if oldest.is_some() => pairs.expire(mux).await,
            () = session.stop.cancelled() => return,
        }
    }
    // The client has gone, and every stream with it.
    while forwards.next().await.is_some() {}
}

impl Pairs {
    /// Adds a stream and returns its pair if it is whole now. When the session is full, no new pair is begun.
    fn add(&mut self, mux: &Mux, opened: &Opened, deadline: Instant, full: bool) -> Option<Pair> {
        let id = opened.id;
        let Some((kind, port)) = classify(&opened.headers) else {
            mux.refuse(id, Refusal::Invalid);
            return None;
        };
        let request = request_id(&opened.headers, kind, id);
        let found = self.0.iter().position(|pair| pair.request == request);
        let mut pair = match found.and_then(|index| self.0.remove(index)) {
            Some(pair) => pair,
            None if full => {
                mux.refuse(id, Refusal::Refused);
                return None;
            }
            None => Pair {
                request,
                port,
                deadline,
                data: None,
                error: None,
            },
        };
        match kind {
            Kind::Data if pair.data.is_none() => {
                pair.port = port;
                let (input, output) = mux.accept(id);
                pair.data = Some((id, input, output));
            }
            Kind::Error if pair.error.is_none() => pair.error = Some((id, mux.accept(id).1)),
            Kind::Data | Kind::Error => mux.refuse(id, Refusal::Invalid),
        }
        if pair.data.is_some() && pair.error.is_some() {
            return Some(pair);
        }
        let index = found.unwrap_or(self.0.len());
        self.0.insert(index, pair);
        None
    }

    /// Gives up the pairs whose time is over.
    async fn expire(&mut self, mux: &Mux) {
        let now = Instant::now();
        while self.0.front().is_some_and(|pair| pair.deadline <= now) {
            let Some(pair) = self.0.pop_front() else {
                return;
            };
            if let Some((id, ..)) = pair.data {
                mux.reset(id, Refusal::Cancelled);
            }
            if let Some((id, mut error)) = pair.error {
                let _ = error.write_all(b"the data stream was not opened in time").await;
                drop(error);
                mux.reset(id, Refusal::Cancelled);
            }
        }
    }
}

/// Forwards one connection.
async fn forward<R: Runtime>(session: &Session<'_, R>, mux: &Mux, pod: &str, pair: Pair) {
    let (Some((id, input, output)), Some((error_id, mut error))) = (pair.data, pair.error) else {
        return;
    };
    let forward = Forward {
        pod: pod.to_owned(),
        port: pair.port,
        input,
        output,
        hangup: mux.hangup(),
    };
    if let Err(failure) = session.runtime.port_forward(forward).await {
        let message = format!(
            "cannot forward to port {} of pod {pod}: {}",
            pair.port,
            chain(&failure)
        );
        tracing::debug!(message, "a forwarded connection failed");
        let _ = error.write_all(message.as_bytes()).await;
    }
    drop(error);
    // What the client has not ended has nobody left to read it.
    mux.reset(id, Refusal::Cancelled);
    mux.reset(error_id, Refusal::Cancelled);
}

fn classify(headers: &Headers) -> Option<(Kind, u16)> {
    let kind = match headers.get("streamtype") {
        "data" => Kind::Data,
        "error" => Kind::Error,
        _ => return None,
    };
    let port: u16 = headers.get("port").parse().ok()?;
    (port > 0).then_some((kind, port))
}

/// What the two streams of a pair have in common. Old clients give none, but open the error stream and then the data
/// stream, whose number is the next.
fn request_id(headers: &Headers, kind: Kind, id: StreamId) -> String {
    match (headers.get("requestid"), kind) {
        ("", Kind::Error) => format!("stream {id}"),
        ("", Kind::Data) => format!("stream {}", id.saturating_sub(2)),
        (request, _) => request.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(fields: &[(&str, &str)]) -> Headers {
        Headers(
            fields
                .iter()
                .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
                .collect(),
        )
    }

    #[test]
    fn a_stream_is_of_a_kind_and_for_a_port() {
        let of = |kind, port| classify(&headers(&[("streamtype", kind), ("port", port)]));
        assert_eq!(of("data", "80"), Some((Kind::Data, 80)));
        assert_eq!(of("error", "65535"), Some((Kind::Error, 65535)));
        for (kind, port) in [
            ("stdin", "80"),
            ("", "80"),
            ("data", "0"),
            ("data", "65536"),
            ("data", "+8 "),
            ("data", ""),
        ] {
            assert_eq!(of(kind, port), None, "{kind:?} {port:?}");
        }
    }

    #[test]
    fn a_pair_without_a_request_id_is_two_streams_in_a_row() {
        let none = headers(&[]);
        assert_eq!(
            request_id(&none, Kind::Error, 5),
            request_id(&none, Kind::Data, 7)
        );
        assert_ne!(
            request_id(&none, Kind::Error, 5),
            request_id(&none, Kind::Data, 9)
        );
        let given = headers(&[("requestid", "5")]);
        assert_eq!(
            request_id(&given, Kind::Error, 1),
            request_id(&given, Kind::Data, 9)
        );
    }
}

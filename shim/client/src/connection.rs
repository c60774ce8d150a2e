//! One multiplexed ttrpc connection: frames out with their descriptors, frames in to whoever waits for them. It knows no
//! method.
//!
//! Two tasks own the socket, so that a caller that goes away never leaves half a frame behind: the writer drains a
//! queue, the reader hands responses to their callers. When the socket ends, every waiting call answers `Gone`.

use crate::{Error, Result};
use bytes::{Buf, BytesMut};
use prost::Message;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use slipway_shim_api::frame::{self, HEADER, Header, Kind};
use slipway_shim_api::{names, ttrpc};
use std::collections::HashMap;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot, watch};

/// Frames waiting to be written before callers wait too.
const QUEUE: usize = 64;

struct Outgoing {
    frame: Vec<u8>,
    fds: Vec<OwnedFd>,
}

type Waiting = HashMap<u32, oneshot::Sender<ttrpc::Response>>;

/// The calls that wait for an answer; `None` once the connection has ended.
struct Calls {
    next: u32,
    waiting: Option<Waiting>,
}

pub(crate) struct Connection {
    outgoing: mpsc::Sender<Outgoing>,
    calls: Arc<Mutex<Calls>>,
    ended: watch::Receiver<bool>,
}

fn lock(calls: &Mutex<Calls>) -> std::sync::MutexGuard<'_, Calls> {
    calls.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Takes a call out of the table however its future ends.
struct Slot<'a> {
    calls: &'a Mutex<Calls>,
    stream: u32,
}

impl Drop for Slot<'_> {
    fn drop(&mut self) {
        if let Some(waiting) = &mut lock(self.calls).waiting {
            waiting.remove(&self.stream);
        }
    }
}

impl Connection {
    pub(crate) fn new(stream: UnixStream) -> Connection {
        let stream = Arc::new(stream);
        let (outgoing, queue) = mpsc::channel(QUEUE);
        let calls = Arc::new(Mutex::new(Calls {
            next: 1,
            waiting: Some(HashMap::new()),
        }));
        let (end, ended) = watch::channel(false);
        tokio::spawn(write_all(stream.clone(), queue));
        let table = calls.clone();
        tokio::spawn(async move {
            if let Err(error) = read_all(&stream, &table).await {
                tracing::debug!(%error, "the connection to a shim broke");
            }
            // Dropping the senders wakes the callers.
            lock(&table).waiting = None;
            let _ = end.send(true);
        });
        Connection {
            outgoing,
            calls,
            ended,
        }
    }

    /// Resolves when the connection is gone.
    pub(crate) async fn closed(&self) {
        let mut ended = self.ended.clone();
        // An error means that the reader is gone, which is the same.
        let _ = ended.wait_for(|ended| *ended).await;
    }

    /// One call. `deadline` covers everything from queueing to the answer; `None` waits for as long as the shim lives.
    pub(crate) async fn call<Q: Message, R: Message + Default>(
        &self,
        service: &'static str,
        method: &'static str,
        request: &Q,
        fds: Vec<OwnedFd>,
        deadline: Option<Duration>,
    ) -> Result<R> {
        let call = self.exchange(service, method, request, fds, deadline);
        let response = match deadline {
            Some(after) => tokio::time::timeout(after, call)
                .await
                .map_err(|_| Error::Timeout { method, after })??,
            None => call.await?,
        };
        if let Some(status) = response.status.filter(|s| s.code != 0) {
            return Err(Error::Status {
                code: status.code,
                message: status.message,
            });
        }
        R::decode(response.payload.as_slice()).map_err(|source| Error::Decode { method, source })
    }

    async fn exchange<Q: Message>(
        &self,
        service: &str,
        method: &'static str,
        request: &Q,
        fds: Vec<OwnedFd>,
        deadline: Option<Duration>,
    ) -> Result<ttrpc::Response> {
        let mut metadata = Vec::new();
        if !fds.is_empty() {
            metadata.push(ttrpc::KeyValue {
                key: names::FDS.into(),
                value: fds.len().to_string(),
            });
        }
        let request = ttrpc::Request {
            service: service.into(),
            method: method.into(),
            payload: request.encode_to_vec(),
            timeout_nano: deadline.map_or(0, |d| i64::try_from(d.as_nanos()).unwrap_or(0)),
            metadata,
        };
        let (sender, answer) = oneshot::channel();
        let stream = {
            let mut calls = lock(&self.calls);
            let stream = calls.next;
            // Streams of a client are odd; after 2^31 calls the numbers begin anew, long after their first use.
            calls.next = calls.next.checked_add(2).unwrap_or(1);
            calls.waiting.as_mut().ok_or(Error::Gone)?.insert(stream, sender);
            stream
        };
        let _slot = Slot {
            calls: &self.calls,
            stream,
        };
        let frame = frame::encode(stream, Kind::Request, &request)
            .map_err(|source| Error::TooLong { method, source })?;
        self.outgoing
            .send(Outgoing { frame, fds })
            .await
            .map_err(|_| Error::Gone)?;
        answer.await.map_err(|_| Error::Gone)
    }
}

async fn write_all(stream: Arc<UnixStream>, mut queue: mpsc::Receiver<Outgoing>) {
    while let Some(Outgoing { frame, fds }) = queue.recv().await {
        if let Err(error) = write_frame(&stream, &frame, &fds).await {
            tracing::debug!(%error, "a shim takes no more requests");
            break;
        }
    }
    // Every handle is gone, or the shim is: the reader sees the end too.
    let _ = rustix::net::shutdown(stream.as_fd(), rustix::net::Shutdown::Both);
}

async fn write_frame(stream: &UnixStream, frame: &[u8], fds: &[OwnedFd]) -> io::Result<()> {
    let mut written = 0;
    while written < frame.len() {
        stream.writable().await?;
        let sent = stream.try_io(Interest::WRITABLE, || {
            let rest = [IoSlice::new(&frame[written..])];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(names::MAX_FDS))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            let borrowed: Vec<_> = fds.iter().map(|fd| fd.as_fd()).collect();
            // The descriptors go with the first byte; a send that takes less than all still takes them.
            if written == 0 && !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&borrowed)) {
                return Err(io::ErrorKind::ArgumentListTooLong.into());
            }
            Ok(rustix::net::sendmsg(
                stream,
                &rest,
                &mut control,
                SendFlags::NOSIGNAL,
            )?)
        });
        match sent {
            Ok(n) => written += n,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

async fn read_all(stream: &UnixStream, calls: &Mutex<Calls>) -> io::Result<()> {
    let mut buffer = BytesMut::with_capacity(4096);
    loop {
        stream.readable().await?;
        match stream.try_read_buf(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            Err(error) => return Err(error),
        }
        while let Some((header, data)) = next_frame(&mut buffer)? {
            if header.kind != Kind::Response {
                continue;
            }
            let response = ttrpc::Response::decode(data).map_err(io::Error::other)?;
            let waiting = lock(calls)
                .waiting
                .as_mut()
                .and_then(|w| w.remove(&header.stream));
            if let Some(waiting) = waiting {
                let _ = waiting.send(response);
            }
        }
        buffer.reserve(4096);
    }
}

fn next_frame(buffer: &mut BytesMut) -> io::Result<Option<(Header, BytesMut)>> {
    let Some(bytes) = buffer.first_chunk::<HEADER>() else {
        return Ok(None);
    };
    let header = Header::decode(bytes).map_err(io::Error::other)?;
    let length = header.length as usize;
    if buffer.len() < HEADER + length {
        buffer.reserve(HEADER + length - buffer.len());
        return Ok(None);
    }
    buffer.advance(HEADER);
    Ok(Some((header, buffer.split_to(length))))
}

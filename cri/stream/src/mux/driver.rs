//! The I/O of one connection: reads for the framing, writes what it collected, and notices when nothing moves.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::{Instant, Interval, MissedTickBehavior, interval_at, timeout};
use tokio_util::io::poll_read_buf;

use super::shared::{Mux, Shared, State, register};
use super::{OUT_BUFFER, Received, Refusal};
use crate::transport::Transport;
use crate::violation::Violation;

/// What is read at once.
const READ: usize = 64 << 10;
/// How often a connection is looked at that does nothing.
const TICK: Duration = Duration::from_secs(5);

/// What a connection is ended for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// Nothing came or went for this long.
    pub idle: Duration,
    /// What was to go did not for this long.
    pub stalled: Duration,
    /// How long the last words may take, and the peer's answer to them.
    pub farewell: Duration,
}

/// How a connection ended.
#[derive(Debug)]
pub(crate) enum Ended {
    /// The session closed it.
    Finished,
    /// The peer said goodbye.
    Goodbye,
    /// The peer has gone.
    Gone,
    /// Nothing moved for too long.
    Idle,
    /// The peer took nothing of what it was sent for too long.
    Stalled,
    /// The connection failed.
    Broken(io::Error),
    /// The peer broke the protocol.
    Violated(Violation),
}

/// Moves bytes between a connection and its [`Mux`].
pub(crate) struct Driver<T> {
    io: T,
    shared: Arc<Shared>,
    limits: Limits,
    input: BytesMut,
    writing: BytesMut,
    /// Something was written and not flushed.
    unflushed: bool,
    /// The session is done and the peer has been told so, or will have been with what is in `writing`.
    said_goodbye: bool,
    /// When something last came or went.
    moved: Instant,
    /// When something last went, or began to wait.
    wrote: Instant,
    /// When it was first seen that something waits for the peer to take it, or to open its window.
    owing: Option<Instant>,
    tick: Interval,
}

/// What the framing left for the driver to do.
struct Work {
    read: bool,
    done: bool,
}

impl<T: Transport> Driver<T> {
    /// `read_ahead` is what was read from `io` already.
    pub fn new(io: T, mux: &Mux, read_ahead: &Bytes, limits: Limits) -> Driver<T> {
        let now = Instant::now();
        let period = (limits.idle.min(limits.stalled) / 4).clamp(Duration::from_millis(10), TICK);
        let mut tick = interval_at(now + period, period);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Driver {
            io,
            shared: mux.shared.clone(),
            limits,
            input: BytesMut::from(&read_ahead[..]),
            writing: BytesMut::new(),
            unflushed: false,
            said_goodbye: false,
            moved: now,
            wrote: now,
            owing: None,
            tick,
        }
    }

    /// Serves the connection until it is over; then everyone who waits for it has been told.
    pub async fn run(mut self) -> Ended {
        let ended = poll_fn(|cx| self.poll(cx)).await;
        {
            let State { framing, table } = &mut *self.shared.lock();
            match ended {
                Ended::Idle => framing.goodbye(table),
                Ended::Stalled => {
                    for id in table.live() {
                        framing.reset(id, Refusal::Cancelled, table);
                    }
                    framing.expel(table);
                }
                _ => {}
            }
            table.end();
        }
        self.shared.hangup.cancel();
        if !matches!(ended, Ended::Gone | Ended::Broken(_)) {
            // Whether the peer hears it or not, the connection is over.
            let _ = timeout(self.limits.farewell, self.farewell()).await;
        }
        ended
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Ended> {
        loop {
            let work = match self.exchange(cx) {
                Ok(work) => work,
                Err(ended) => return Poll::Ready(ended),
            };
            let wrote = match self.poll_write(cx) {
                Ok(wrote) => wrote,
                Err(error) => return Poll::Ready(Ended::Broken(error)),
            };
            if work.done && self.writing.is_empty() && !self.unflushed {
                return Poll::Ready(Ended::Finished);
            }
            let read = match work.read.then(|| self.poll_read(cx)).transpose() {
                Ok(Some(0)) => return Poll::Ready(Ended::Gone),
                Ok(read) => read.is_some_and(|count| count != usize::MAX),
                Err(error) => return Poll::Ready(Ended::Broken(error)),
            };
            if !wrote && !read {
                return self.poll_tick(cx, work.read);
            }
        }
    }

    /// Gives the framing what was read and takes what is to be written.
    fn exchange(&mut self, cx: &Context<'_>) -> Result<Work, Ended> {
        let State { framing, table } = &mut *self.shared.lock();
        register(&mut table.driver, cx);
        if !table.blocked && table.out.len() < 2 * OUT_BUFFER {
            match framing.receive(&mut self.input, table) {
                Ok(Received::Taken) => {}
                Ok(Received::Goodbye) => return Err(Ended::Goodbye),
                Err(violation) => return Err(Ended::Violated(violation)),
            }
        }
        if table.closing && !self.said_goodbye {
            framing.goodbye(table);
            self.said_goodbye = true;
        }
        if self.writing.is_empty() {
            self.writing.clear();
            framing.collect(table, &mut self.writing);
            if !self.writing.is_empty() {
                self.wrote = Instant::now();
                table.wake_queue();
            }
        }
        Ok(Work {
            read: !table.blocked && table.out.len() < 2 * OUT_BUFFER,
            done: self.said_goodbye && table.out.is_empty(),
        })
    }

    /// Whether something was written.
    fn poll_write(&mut self, cx: &mut Context<'_>) -> io::Result<bool> {
        let mut wrote = false;
        while !self.writing.is_empty() {
            match Pin::new(&mut self.io).poll_write(cx, &self.writing) {
                Poll::Ready(Ok(0)) => return Err(io::ErrorKind::WriteZero.into()),
                Poll::Ready(Ok(count)) => {
                    self.writing.advance(count);
                    self.unflushed = true;
                    self.wrote = Instant::now();
                    self.moved = self.wrote;
                    wrote = true;
                }
                Poll::Ready(Err(error)) => return Err(error),
                Poll::Pending => return Ok(wrote),
            }
        }
        if self.unflushed {
            match Pin::new(&mut self.io).poll_flush(cx) {
                Poll::Ready(flushed) => {
                    flushed?;
                    self.unflushed = false;
                }
                Poll::Pending => {}
            }
        }
        Ok(wrote)
    }

    /// How much was read: 0 at the end of the connection, `usize::MAX` when there is nothing now.
    fn poll_read(&mut self, cx: &mut Context<'_>) -> io::Result<usize> {
        self.input.reserve(READ);
        match poll_read_buf(Pin::new(&mut self.io), cx, &mut self.input) {
            Poll::Ready(Ok(count)) => {
                self.moved = Instant::now();
                Ok(count)
            }
            Poll::Ready(Err(error)) => Err(error),
            Poll::Pending => Ok(usize::MAX),
        }
    }

    fn poll_tick(&mut self, cx: &mut Context<'_>, reading: bool) -> Poll<Ended> {
        while self.tick.poll_tick(cx).is_ready() {
            let now = Instant::now();
            if self.writing.is_empty() && !self.shared.lock().table.owes() {
                self.owing = None;
            } else if now - self.wrote.max(*self.owing.get_or_insert(now)) > self.limits.stalled {
                return Poll::Ready(Ended::Stalled);
            }
            if now - self.moved > self.limits.idle {
                return Poll::Ready(Ended::Idle);
            }
            if !reading && self.io.hung_up() {
                return Poll::Ready(Ended::Gone);
            }
            if now - self.moved > self.tick.period() {
                self.shrink();
            }
        }
        Poll::Pending
    }

    /// A connection that rests keeps no buffers.
    fn shrink(&mut self) {
        if self.input.is_empty() {
            self.input = BytesMut::new();
        }
        if self.writing.is_empty() {
            self.writing = BytesMut::new();
        }
        self.shared.lock().table.shrink();
    }

    /// Writes what is left and waits for the peer to close: a connection closed with something unread would take the last
    /// words with it.
    async fn farewell(&mut self) -> io::Result<()> {
        loop {
            self.io.write_all_buf(&mut self.writing).await?;
            let State { framing, table } = &mut *self.shared.lock();
            framing.collect(table, &mut self.writing);
            if self.writing.is_empty() {
                break;
            }
        }
        self.io.flush().await?;
        self.io.shutdown().await?;
        loop {
            self.input.clear();
            if self.io.read_buf(&mut self.input).await? == 0 {
                return Ok(());
            }
        }
    }
}

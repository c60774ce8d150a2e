//! Blocks of a stream encoded by several threads at once and written in their order.
//!
//! What comes out depends on the blocks, never on the number of threads.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

type Encode = dyn Fn(&[u8]) -> io::Result<Vec<u8>> + Send + Sync;
type Encoded = io::Result<Vec<u8>>;

struct Job {
    block: Vec<u8>,
    done: SyncSender<Encoded>,
}

/// A writer that cuts what it gets into blocks.
pub(super) struct Blocks<W: Write> {
    out: W,
    block: usize,
    filling: Vec<u8>,
    /// The results to come, in order.
    waiting: VecDeque<Receiver<Encoded>>,
    jobs: Option<Sender<Job>>,
    workers: Vec<JoinHandle<()>>,
    any: bool,
}

impl<W: Write> Blocks<W> {
    pub(super) fn new(out: W, block: usize, threads: usize, encode: Arc<Encode>) -> Blocks<W> {
        let (jobs, queue) = channel::<Job>();
        let queue = Arc::new(Mutex::new(queue));
        let workers = (0..threads.max(1))
            .map(|_| {
                let (queue, encode) = (Arc::clone(&queue), Arc::clone(&encode));
                std::thread::spawn(move || work(&queue, &*encode))
            })
            .collect();
        Blocks {
            out,
            block,
            filling: Vec::with_capacity(block),
            waiting: VecDeque::new(),
            jobs: Some(jobs),
            workers,
            any: false,
        }
    }

    /// Hands the block out, and writes what is ready when enough is under way.
    fn submit(&mut self) -> io::Result<()> {
        let block = std::mem::replace(&mut self.filling, Vec::with_capacity(self.block));
        let (done, result) = sync_channel(1);
        let sent = self.jobs.as_ref().map(|jobs| jobs.send(Job { block, done }));
        if !matches!(sent, Some(Ok(()))) {
            return Err(io::Error::other("the encoding threads are gone"));
        }
        self.any = true;
        self.waiting.push_back(result);
        while self.waiting.len() > 2 * self.workers.len() {
            self.write_next()?;
        }
        Ok(())
    }

    fn write_next(&mut self) -> io::Result<()> {
        let Some(result) = self.waiting.pop_front() else {
            return Ok(());
        };
        let encoded = result
            .recv()
            .map_err(|_| io::Error::other("an encoding thread died"))??;
        self.out.write_all(&encoded)
    }

    /// Writes everything, and hands the stream back.
    pub(super) fn finish(mut self) -> io::Result<W> {
        // An empty stream is one empty block: a reader wants at least one member or frame.
        if !self.filling.is_empty() || !self.any {
            self.submit()?;
        }
        while !self.waiting.is_empty() {
            self.write_next()?;
        }
        self.jobs = None;
        for worker in self.workers.drain(..) {
            worker
                .join()
                .map_err(|_| io::Error::other("an encoding thread panicked"))?;
        }
        self.out.flush()?;
        Ok(self.out)
    }
}

impl<W: Write> Write for Blocks<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = bytes.len().min(self.block - self.filling.len());
        self.filling.extend_from_slice(&bytes[..n]);
        if self.filling.len() == self.block {
            self.submit()?;
        }
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn work(queue: &Mutex<Receiver<Job>>, encode: &Encode) {
    loop {
        // The lock is held while waiting: the others wait for the lock then, which is the same to them.
        let job = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(Job { block, done }) = job else { return };
        // Nobody listens any more when the writer has failed.
        let _ = done.send(encode(&block));
    }
}

//! Compressing a layer's tar by all processors at once, with bytes that depend on nothing but the input.
//!
//! The input is cut into blocks of a fixed size, each a gzip member or a zstd frame of its own; both formats read a
//! row of those as one stream. So the output is the same for one worker and for many. Refuses to know what a layer is.

use crate::store::Compression;
use flate2::write::GzEncoder;
use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

/// Bytes of input in a gzip member: small enough to keep every processor busy, large enough to cost no ratio.
const GZIP_BLOCK: usize = 1 << 20;
/// Bytes of input in a zstd frame.
const ZSTD_BLOCK: usize = 4 << 20;

type Job = (Vec<u8>, Sender<io::Result<Vec<u8>>>);

/// A writer that compresses what it is given to `out`. Call [`Encoder::finish`]: dropping it loses the end.
pub struct Encoder<W: Write> {
    out: W,
    compression: Compression,
    block: Vec<u8>,
    block_size: usize,
    /// Results to come, in order.
    pending: VecDeque<Receiver<io::Result<Vec<u8>>>>,
    /// `None` for no compression, and once finished.
    jobs: Option<SyncSender<Job>>,
    workers: Vec<JoinHandle<()>>,
    any: bool,
}

impl<W: Write> Encoder<W> {
    /// An encoder with `workers` threads; 0: one a processor, at most 8.
    ///
    /// # Errors
    /// When a thread cannot be started.
    pub fn new(out: W, compression: Compression, workers: usize) -> io::Result<Encoder<W>> {
        let workers = match workers {
            0 => std::thread::available_parallelism().map_or(1, usize::from).min(8),
            n => n,
        };
        let mut encoder = Encoder {
            out,
            compression,
            block: Vec::new(),
            block_size: if matches!(compression, Compression::Zstd(_)) { ZSTD_BLOCK } else { GZIP_BLOCK },
            pending: VecDeque::new(),
            jobs: None,
            workers: Vec::new(),
            any: false,
        };
        if compression != Compression::None {
            let (send, receive) = sync_channel::<Job>(workers);
            let receive = Arc::new(Mutex::new(receive));
            for n in 0..workers {
                let receive = Arc::clone(&receive);
                let thread = std::thread::Builder::new().name(format!("encode-{n}"));
                encoder.workers.push(thread.spawn(move || work(&receive, compression))?);
            }
            encoder.jobs = Some(send);
        }
        Ok(encoder)
    }

    /// Compresses what is left, waits for it, and gives the output back.
    ///
    /// # Errors
    /// When a block cannot be compressed or written.
    pub fn finish(mut self) -> io::Result<W> {
        if self.jobs.is_some() && (!self.block.is_empty() || !self.any) {
            self.submit()?;
        }
        self.jobs = None;
        while !self.pending.is_empty() {
            self.collect()?;
        }
        for worker in self.workers.drain(..) {
            worker.join().map_err(|_| io::Error::other("a compression thread panicked"))?;
        }
        self.out.flush()?;
        Ok(self.out)
    }

    fn submit(&mut self) -> io::Result<()> {
        // Twice as many blocks as workers: memory stays bounded, nobody waits for the writer.
        while self.pending.len() >= self.workers.len() * 2 {
            self.collect()?;
        }
        let (send, receive) = channel();
        let block = std::mem::replace(&mut self.block, Vec::with_capacity(self.block_size));
        let gone = || io::Error::other("the compression threads are gone");
        self.jobs.as_ref().ok_or_else(gone)?.send((block, send)).map_err(|_| gone())?;
        self.pending.push_back(receive);
        self.any = true;
        Ok(())
    }

    fn collect(&mut self) -> io::Result<()> {
        let Some(next) = self.pending.pop_front() else { return Ok(()) };
        let bytes = next.recv().map_err(|_| io::Error::other("a compression thread panicked"))??;
        self.out.write_all(&bytes)
    }
}

impl<W: Write> Write for Encoder<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.compression == Compression::None {
            return self.out.write(bytes);
        }
        let taken = bytes.len().min(self.block_size - self.block.len());
        self.block.extend_from_slice(&bytes[..taken]);
        if self.block.len() == self.block_size {
            self.submit()?;
        }
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        // Blocks have a fixed size: a flush must not cut one short, or the output would depend on it.
        Ok(())
    }
}

fn work(jobs: &Mutex<Receiver<Job>>, compression: Compression) {
    loop {
        let job = match jobs.lock() {
            Ok(jobs) => jobs.recv(),
            Err(_) => return,
        };
        let Ok((block, answer)) = job else { return };
        // The encoder may have failed meanwhile and wait no longer.
        let _ = answer.send(compress(&block, compression));
    }
}

fn compress(block: &[u8], compression: Compression) -> io::Result<Vec<u8>> {
    match compression {
        Compression::Gzip(level) => {
            let mut gz = GzEncoder::new(Vec::with_capacity(block.len() / 2), flate2::Compression::new(level));
            gz.write_all(block)?;
            gz.finish()
        }
        Compression::Zstd(level) => zstd::bulk::compress(block, level),
        Compression::None => Ok(block.to_vec()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    fn input(len: usize) -> Vec<u8> {
        let mut x = 0x2545_f491_4f6c_dd1d_u64;
        (0..len)
            .map(|n| {
                x ^= x << 13;
                x ^= x >> 7;
                x ^= x << 17;
                if n % 3 == 0 { x as u8 } else { b'a' }
            })
            .collect()
    }

    fn encode(bytes: &[u8], compression: Compression, workers: usize, chunk: usize) -> Vec<u8> {
        let mut e = Encoder::new(Vec::new(), compression, workers).unwrap();
        for c in bytes.chunks(chunk.max(1)) {
            e.write_all(c).unwrap();
        }
        e.finish().unwrap()
    }

    #[test]
    fn output_depends_only_on_the_input() {
        let bytes = input(5 * GZIP_BLOCK + 12_345);
        for compression in [Compression::Gzip(1), Compression::Zstd(1), Compression::None] {
            let one = encode(&bytes, compression, 1, 100_000);
            assert_eq!(one, encode(&bytes, compression, 4, 7_777_777), "{compression:?}");
        }
    }

    #[test]
    fn what_was_compressed_is_read_back() {
        for len in [0, 1, GZIP_BLOCK, 3 * GZIP_BLOCK + 1] {
            let bytes = input(len);
            let gz = encode(&bytes, Compression::Gzip(6), 2, 65_536);
            let mut back = Vec::new();
            flate2::read::MultiGzDecoder::new(&gz[..]).read_to_end(&mut back).unwrap();
            assert!(back == bytes);
            let z = encode(&bytes, Compression::Zstd(3), 2, 65_536);
            assert!(zstd::stream::decode_all(&z[..]).unwrap() == bytes);
        }
    }

    #[test]
    fn an_output_that_fails_ends_the_encoder_without_a_hang() {
        struct Full;
        impl Write for Full {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::Error::from_raw_os_error(28))
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let mut e = Encoder::new(Full, Compression::Gzip(1), 2).unwrap();
        let failed = e.write_all(&input(20 * GZIP_BLOCK)).and_then(|()| e.finish().map(|_| ()));
        assert!(failed.is_err());
    }
}

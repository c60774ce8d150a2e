//! Copying between descriptors without ever waiting: a pump from one to another, and a sink that a container's output is
//! copied into. Knows neither containers nor logs.
//!
//! A [`Pump`] reads only as much as the other side takes: what is read and not taken is at most one buffer, and the
//! source is not read on until that has gone. A [`Sink`] must not hold its source up: it keeps up to [`PATIENCE`] bytes
//! for a slow reader, leaves out what comes beyond, and says so once the reader has caught up.

use rustix::io::Errno;
use std::os::fd::OwnedFd;

/// Bytes kept for a reader that does not keep up.
pub const PATIENCE: usize = 64 * 1024;

/// From one descriptor to another, both non-blocking.
#[derive(Debug)]
pub struct Pump {
    from: OwnedFd,
    to: OwnedFd,
    left: Vec<u8>,
    output: bool,
    last: bool,
}

/// What a pump waits for next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// Something to read.
    NeedsInput,
    /// Room to write.
    NeedsRoom,
    /// The source has ended, and everything is written.
    Ended,
    /// Nobody reads any more.
    Broken,
}

impl Pump {
    /// Nothing copied yet. `output`: it carries what a process says, not what it is told.
    pub fn new(from: OwnedFd, to: OwnedFd, output: bool) -> Pump {
        Pump {
            from,
            to,
            left: Vec::new(),
            output,
            last: false,
        }
    }

    /// What its source holds now is the last of it.
    pub fn finish(&mut self) {
        self.last = true;
    }

    /// Whether it carries what a process says.
    pub fn is_output(&self) -> bool {
        self.output
    }

    /// The side that is read.
    pub fn from(&self) -> &OwnedFd {
        &self.from
    }

    /// The side that is written.
    pub fn to(&self) -> &OwnedFd {
        &self.to
    }

    /// Copies until one side is not ready, or for a while: then it needs what it needed.
    pub fn run(&mut self, scratch: &mut [u8]) -> Flow {
        for _ in 0..16 {
            if !self.left.is_empty() {
                match write(&self.to, &self.left) {
                    Written::Bytes(n) => {
                        self.left.drain(..n);
                    }
                    Written::Full => return Flow::NeedsRoom,
                    Written::Broken => return Flow::Broken,
                }
                if !self.left.is_empty() {
                    continue;
                }
                self.left = Vec::new();
            }
            let n = match rustix::io::read(&self.from, &mut *scratch) {
                Ok(0) => return Flow::Ended,
                Ok(n) => n,
                Err(Errno::AGAIN) if self.last => return Flow::Ended,
                Err(Errno::AGAIN) => return Flow::NeedsInput,
                Err(Errno::INTR) => continue,
                // EIO: nobody has the terminal open any more, or never had and will.
                Err(_) => return Flow::Ended,
            };
            match write(&self.to, &scratch[..n]) {
                Written::Bytes(done) => self.left.extend_from_slice(&scratch[done..n]),
                Written::Full => self.left.extend_from_slice(&scratch[..n]),
                Written::Broken => return Flow::Broken,
            }
        }
        if self.left.is_empty() {
            Flow::NeedsInput
        } else {
            Flow::NeedsRoom
        }
    }
}

/// A reader that was attached to a container's output.
#[derive(Debug)]
pub struct Sink {
    to: OwnedFd,
    waiting: Vec<u8>,
    left_out: u64,
}

impl Sink {
    /// Nothing copied yet; the descriptor is non-blocking.
    pub fn new(to: OwnedFd) -> Sink {
        Sink {
            to,
            waiting: Vec::new(),
            left_out: 0,
        }
    }

    /// The descriptor.
    pub fn fd(&self) -> &OwnedFd {
        &self.to
    }

    /// Whether something waits for room.
    pub fn is_behind(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Copies bytes to the reader, or keeps them for it, or leaves them out. False when the reader is gone.
    pub fn push(&mut self, mut bytes: &[u8]) -> bool {
        if self.waiting.is_empty() && self.left_out == 0 {
            match write(&self.to, bytes) {
                Written::Bytes(n) => bytes = &bytes[n..],
                Written::Full => {}
                Written::Broken => return false,
            }
        }
        if self.left_out > 0 || self.waiting.len() + bytes.len() > PATIENCE {
            self.left_out += bytes.len() as u64;
        } else {
            self.waiting.extend_from_slice(bytes);
        }
        true
    }

    /// There is room: writes what waits. False when the reader is gone.
    pub fn drain(&mut self) -> bool {
        while !self.waiting.is_empty() {
            match write(&self.to, &self.waiting) {
                Written::Bytes(n) => {
                    self.waiting.drain(..n);
                }
                Written::Full => return true,
                Written::Broken => return false,
            }
            if self.waiting.is_empty() && self.left_out > 0 {
                let told = format!(
                    "\r\n[slipway: {} bytes left out: the reader was too slow]\r\n",
                    self.left_out
                );
                self.waiting = told.into_bytes();
                self.left_out = 0;
            }
        }
        self.waiting = Vec::new();
        true
    }
}

enum Written {
    Bytes(usize),
    Full,
    Broken,
}

fn write(to: &OwnedFd, bytes: &[u8]) -> Written {
    loop {
        // SIGPIPE is ignored in this process.
        match rustix::io::write(to, bytes) {
            Ok(n) => return Written::Bytes(n),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return Written::Full,
            Err(_) => return Written::Broken,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::pipe::{PipeFlags, pipe_with};

    fn pipe() -> (OwnedFd, OwnedFd) {
        pipe_with(PipeFlags::NONBLOCK | PipeFlags::CLOEXEC).expect("a pipe")
    }

    fn read_all(fd: &OwnedFd) -> Vec<u8> {
        let mut all = Vec::new();
        let mut some = [0; 4096];
        while let Ok(n) = rustix::io::read(fd, &mut some) {
            if n == 0 {
                break;
            }
            all.extend_from_slice(&some[..n]);
        }
        all
    }

    #[test]
    fn a_pump_stops_reading_while_its_reader_is_full() {
        let (from, write) = pipe();
        let (read, to) = pipe();
        let mut pump = Pump::new(from, to, true);
        let mut scratch = [0; 16 * 1024];
        let mut sent = 0;
        let flow = loop {
            while let Ok(n) = rustix::io::write(&write, &[7; 4096]) {
                sent += n;
            }
            match pump.run(&mut scratch) {
                Flow::NeedsInput => {}
                other => break other,
            }
        };
        assert_eq!(flow, Flow::NeedsRoom);
        assert!(pump.left.len() <= scratch.len());
        drop(write);
        let mut received = 0;
        loop {
            received += read_all(&read).len();
            if pump.run(&mut scratch) == Flow::Ended {
                break;
            }
        }
        received += read_all(&read).len();
        assert_eq!(received, sent);
    }

    #[test]
    fn a_slow_reader_misses_what_is_beyond_its_patience_and_is_told() {
        let (read, to) = pipe();
        let mut sink = Sink::new(to);
        for _ in 0..1000 {
            assert!(sink.push(&[b'x'; 1024]));
        }
        assert!(sink.waiting.len() <= PATIENCE && sink.is_behind());
        let mut got = Vec::new();
        while sink.is_behind() {
            got.extend(read_all(&read));
            assert!(sink.drain());
        }
        got.extend(read_all(&read));
        let text = String::from_utf8(got).expect("text");
        let xs = text.bytes().filter(|b| *b == b'x').count();
        assert!(
            text.contains(&format!("[slipway: {} bytes left out", 1000 * 1024 - xs)),
            "{}",
            &text[xs..]
        );
        assert!(sink.push(b"again"));
        assert_eq!(read_all(&read), b"again");
    }

    #[test]
    fn a_reader_that_is_gone_is_noticed() {
        slipway_sys::process::ignore_signal(13).expect("SIGPIPE ignored");
        let (read, to) = pipe();
        drop(read);
        assert!(!Sink::new(to).push(b"x"));
    }
}

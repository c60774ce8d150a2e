//! The output of a RUN: bytes from a pipe become lines for the display, and the last of them are kept for the
//! error message. Bounded, whatever the command writes.

use std::collections::VecDeque;
use std::fs::File;
use std::io::Read;
use std::sync::{Arc, Mutex, PoisonError};

use crate::progress::{Event, Progress, StepId};

/// A line longer than this is shown in parts.
const LINE: usize = 8 * 1024;
/// How many lines are kept for the error message, and how many bytes at most.
const TAIL_LINES: usize = 40;
const TAIL_BYTES: usize = 32 * 1024;

/// Cuts a stream of bytes into lines. A carriage return starts the line anew, as on a terminal: of a progress bar
/// that redraws itself only the last state is told.
#[derive(Debug, Default)]
pub struct Lines {
    buffer: Vec<u8>,
    /// The last byte was a carriage return.
    returned: bool,
}

impl Lines {
    /// Takes bytes and gives each complete line to `line`.
    pub fn push(&mut self, bytes: &[u8], mut line: impl FnMut(&[u8])) {
        for byte in bytes {
            match byte {
                b'\n' => {
                    line(&self.buffer);
                    self.buffer.clear();
                    self.returned = false;
                }
                b'\r' => self.returned = true,
                byte => {
                    if self.returned {
                        self.buffer.clear();
                        self.returned = false;
                    }
                    self.buffer.push(*byte);
                    if self.buffer.len() >= LINE {
                        line(&self.buffer);
                        self.buffer.clear();
                    }
                }
            }
        }
    }

    /// Gives what is left without a line end.
    pub fn finish(&mut self, mut line: impl FnMut(&[u8])) {
        if !self.buffer.is_empty() {
            line(&self.buffer);
            self.buffer.clear();
        }
    }
}

/// The last lines of an output.
#[derive(Debug, Default)]
pub struct Tail {
    lines: Mutex<(VecDeque<Vec<u8>>, usize)>,
}

impl Tail {
    fn push(&self, line: &[u8]) {
        let mut kept = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        let (lines, bytes) = &mut *kept;
        lines.push_back(line.to_vec());
        *bytes += line.len();
        while lines.len() > TAIL_LINES || *bytes > TAIL_BYTES {
            *bytes -= lines.pop_front().map_or(0, |l| l.len());
        }
    }

    /// The lines, as text that a terminal can be given.
    #[must_use]
    pub fn lines(&self) -> Vec<String> {
        let kept = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        kept.0.iter().map(|line| printable(line)).collect()
    }
}

/// Text without escape sequences and control characters: what a build prints cannot move the cursor.
#[must_use]
pub fn printable(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let mut out = String::with_capacity(text.len());
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '\u{1b}' => match chars.next() {
                // CSI … final byte
                Some('[') => while chars.next().is_some_and(|c| !('\u{40}'..='\u{7e}').contains(&c)) {},
                // OSC … BEL or ST
                Some(']') => while chars.next().is_some_and(|c| c != '\u{7}' && c != '\u{1b}') {},
                _ => {}
            },
            '\t' => out.push_str("    "),
            c if c.is_control() => {}
            c => out.push(c),
        }
    }
    out
}

/// Reads a pipe to its end on a thread of its own; the receiver hears when it ended.
#[must_use]
pub fn follow(
    mut pipe: File,
    step: StepId,
    progress: Arc<dyn Progress>,
    tail: Arc<Tail>,
) -> tokio::sync::oneshot::Receiver<()> {
    let (done, ended) = tokio::sync::oneshot::channel();
    std::thread::spawn(move || {
        let mut lines = Lines::default();
        let mut buffer = vec![0; 64 * 1024];
        let tell = |line: &[u8]| {
            tail.push(line);
            progress.event(Event::Output {
                step,
                line: line.into(),
            });
        };
        loop {
            match pipe.read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => lines.push(&buffer[..n], tell),
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(e) => {
                    tracing::warn!(error = %e, "cannot read the output of a step");
                    break;
                }
            }
        }
        lines.finish(tell);
        let _ = done.send(());
    });
    ended
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(chunks: &[&str]) -> Vec<String> {
        let mut out = Vec::new();
        let mut lines = Lines::default();
        for chunk in chunks {
            lines.push(chunk.as_bytes(), |l| {
                out.push(String::from_utf8_lossy(l).into_owned())
            });
        }
        lines.finish(|l| out.push(String::from_utf8_lossy(l).into_owned()));
        out
    }

    #[test]
    fn lines_are_whole_whatever_the_chunks() {
        assert_eq!(lines(&["a", "b\nc", "\r\n", "d"]), ["ab", "c", "d"]);
        assert_eq!(lines(&["\n\n"]), ["", ""]);
    }

    #[test]
    fn a_line_that_redraws_itself_is_told_once() {
        assert_eq!(lines(&["10%\r20%\r", "100%\ndone\n"]), ["100%", "done"]);
    }

    #[test]
    fn an_endless_line_is_told_in_parts() {
        let long = "x".repeat(LINE * 2 + 1);
        assert_eq!(
            lines(&[&long]).iter().map(String::len).collect::<Vec<_>>(),
            [LINE, LINE, 1]
        );
    }

    #[test]
    fn escape_sequences_do_not_reach_the_terminal() {
        assert_eq!(
            printable(b"\x1b[31mred\x1b[0m \x1b]0;title\x07x\x08y\tz"),
            "red xy    z"
        );
    }

    #[test]
    fn the_tail_is_bounded() {
        let tail = Tail::default();
        for n in 0..1000 {
            tail.push(format!("{n}").as_bytes());
        }
        assert_eq!(tail.lines().len(), TAIL_LINES);
        assert_eq!(tail.lines().last().map(String::as_str), Some("999"));
    }
}

//! Progress on a terminal: what is done scrolls up, what runs is redrawn below with the tail of its output.
//!
//! ```text
//! ✓ [1/4] FROM docker.io/library/python:3.12-slim   0.0 s
//! ✓ [2/4] WORKDIR /app                              cached
//! ● [3/4] RUN pip install -r requirements.txt       3.2 s      ┐
//!     Collecting numpy                                         ├ redrawn
//!     Downloading numpy-2.1.0-cp312-manylinux.whl (16.3 MB)    ┘
//! ```
//! The block below is erased and written anew in one write; its height never exceeds the terminal's.

use std::collections::{BTreeMap, VecDeque};
use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use slipway_engine::{Event, Outcome, Progress, StepId, StepLabel, printable};

use super::Display;
use crate::text;

const REDRAW: Duration = Duration::from_millis(100);
/// Lines of output shown below a running step, when there is room.
const TAIL: usize = 6;

const DIM: &str = "\x1b[2m";
const GREEN: &str = "\x1b[32m";
const RED: &str = "\x1b[31m";
const YELLOW: &str = "\x1b[33m";
const CYAN: &str = "\x1b[36m";
const RESET: &str = "\x1b[0m";

struct Running {
    label: StepLabel,
    began: Instant,
    tail: VecDeque<String>,
    remark: Option<String>,
    transfers: BTreeMap<String, (u64, u64)>,
}

impl Running {
    fn new(label: StepLabel) -> Running {
        Running {
            label,
            began: Instant::now(),
            tail: VecDeque::new(),
            remark: None,
            transfers: BTreeMap::new(),
        }
    }

    /// What stands right of the step's name.
    fn state(&self) -> String {
        let time = running_time(self.began.elapsed());
        let (done, total) = self
            .transfers
            .values()
            .fold((0, 0), |sum, t| (sum.0 + t.0, sum.1 + t.1));
        if total > 0 && done < total {
            format!("{} of {}  {time}", text::size(done), text::size(total))
        } else {
            time
        }
    }
}

#[derive(Default)]
struct State {
    running: BTreeMap<StepId, Running>,
    /// Lines that are to stay, not written yet.
    above: Vec<String>,
    /// Height of the block that is on the screen.
    drawn: usize,
    committing: Option<Instant>,
    changed: bool,
}

/// Draws on stdout until it is finished.
pub struct Tty {
    state: Mutex<State>,
    over: AtomicBool,
    painter: Mutex<Option<JoinHandle<()>>>,
}

impl Tty {
    /// Starts to draw.
    pub fn start() -> Arc<Tty> {
        let tty = Arc::new(Tty {
            state: Mutex::default(),
            over: AtomicBool::new(false),
            painter: Mutex::default(),
        });
        let painted = Arc::clone(&tty);
        let painter = std::thread::spawn(move || {
            while !painted.over.load(Ordering::Relaxed) {
                painted.draw();
                std::thread::sleep(REDRAW);
            }
        });
        *tty.painter.lock().unwrap_or_else(PoisonError::into_inner) = Some(painter);
        tty
    }

    fn draw(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if !state.changed && state.running.is_empty() && state.committing.is_none() {
            return;
        }
        state.changed = false;
        let frame = state.frame(terminal_size());
        let mut out = std::io::stdout().lock();
        let _ = out.write_all(frame.as_bytes()).and_then(|()| out.flush());
    }
}

impl State {
    /// Everything to write for the next picture.
    fn frame(&mut self, (width, height): (usize, usize)) -> String {
        let mut frame = String::new();
        if self.drawn > 0 {
            frame.push_str(&format!("\x1b[{}A", self.drawn));
        }
        frame.push_str("\r\x1b[J");
        for line in self.above.drain(..) {
            frame.push_str(&line);
            frame.push('\n');
        }
        let block = self.block(width, height.saturating_sub(1));
        for line in &block {
            frame.push_str(line);
            frame.push('\n');
        }
        self.drawn = block.len();
        frame
    }

    /// The lines that are redrawn, none wider than the terminal, no more of them than fit.
    fn block(&self, width: usize, height: usize) -> Vec<String> {
        let mut lines = Vec::new();
        let running = self.running.len().max(1);
        // Every running step gets its line first; what is left is shared by the tails.
        let tail = (height.saturating_sub(running) / running).min(TAIL);
        for step in self.running.values() {
            let state = step.state();
            let name = format!("{} {}", step.label.bracket(), step.label.text);
            lines.push(row(CYAN, "●", &name, &state, width));
            if let Some(remark) = &step.remark {
                lines.push(format!(
                    "{DIM}    {}{RESET}",
                    fit(remark, width.saturating_sub(5))
                ));
            }
            for line in step.tail.iter().rev().take(tail).rev() {
                lines.push(format!("{DIM}    {}{RESET}", fit(line, width.saturating_sub(5))));
            }
        }
        if let Some(since) = self.committing {
            lines.push(row(
                CYAN,
                "●",
                "completing the image",
                &text::time(since.elapsed()),
                width,
            ));
        }
        lines.truncate(height);
        lines
    }

    fn stay(&mut self, colour: &str, mark: &str, label: &StepLabel, state: &str, width: usize) {
        let name = format!("{} {}", label.bracket(), label.text);
        self.above.push(row(colour, mark, &name, state, width));
    }
}

/// `mark name …… state`, exactly as wide as the terminal allows.
fn row(colour: &str, mark: &str, name: &str, state: &str, width: usize) -> String {
    let room = width.saturating_sub(state.chars().count() + 5).max(10);
    let name = fit(name, room);
    let pad = room.saturating_sub(wide(&name));
    format!(
        "{colour}{mark}{RESET} {name}{}  {DIM}{state}{RESET}",
        " ".repeat(pad)
    )
}

/// As much of `text` as fits into `width` columns.
fn fit(text: &str, width: usize) -> String {
    let text = printable(text.as_bytes());
    if wide(&text) <= width {
        return text;
    }
    let mut out = String::new();
    let mut used = 0;
    for c in text.chars() {
        let w = columns(c);
        if used + w > width.saturating_sub(1) {
            break;
        }
        out.push(c);
        used += w;
    }
    out.push('…');
    out
}

fn wide(text: &str) -> usize {
    text.chars().map(columns).sum()
}

/// Columns of a character: 2 for East Asian wide ones and emoji, 0 for combining marks.
fn columns(c: char) -> usize {
    match u32::from(c) {
        0x300..=0x36f | 0x200b..=0x200f | 0xfe00..=0xfe0f => 0,
        0x1100..=0x115f
        | 0x2e80..=0x303e
        | 0x3041..=0xa4cf
        | 0xac00..=0xd7a3
        | 0xf900..=0xfaff
        | 0xfe30..=0xfe4f
        | 0xff00..=0xff60
        | 0xffe0..=0xffe6
        | 0x1f300..=0x1f64f
        | 0x1f680..=0x1f6ff
        | 0x1f900..=0x1f9ff
        | 0x20000..=0x3fffd => 2,
        _ => 1,
    }
}

/// Time of what still runs: no digits that flicker.
fn running_time(time: Duration) -> String {
    if time < Duration::from_secs(60) {
        format!("{:.1} s", time.as_secs_f64())
    } else {
        text::time(time)
    }
}

fn terminal_size() -> (usize, usize) {
    match rustix::termios::tcgetwinsize(std::io::stdout()) {
        Ok(size) if size.ws_col > 0 && size.ws_row > 0 => (size.ws_col.into(), size.ws_row.into()),
        _ => (100, 24),
    }
}

impl Progress for Tty {
    fn event(&self, event: Event) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.changed = true;
        let pulling = || {
            Running::new(StepLabel {
                stage: None,
                number: 1,
                total: 1,
                text: "base image".into(),
            })
        };
        match event {
            Event::Started { step, label } => {
                state.running.insert(step, Running::new(label));
            }
            Event::Output { step, line } => {
                if let Some(step) = state.running.get_mut(&step) {
                    step.tail.push_back(printable(&line));
                    while step.tail.len() > TAIL {
                        step.tail.pop_front();
                    }
                }
            }
            Event::Remark { step, text } => {
                state.running.entry(step).or_insert_with(pulling).remark = Some(text);
            }
            Event::Transfer {
                step,
                what,
                done,
                total,
            } => {
                state
                    .running
                    .entry(step)
                    .or_insert_with(pulling)
                    .transfers
                    .insert(what, (done, total));
            }
            Event::Ended {
                step,
                outcome,
                elapsed,
            } => {
                let Some(ended) = state.running.remove(&step) else {
                    return;
                };
                let (width, _) = terminal_size();
                let time = text::time(elapsed);
                let (colour, mark, text) = match outcome {
                    Outcome::Done => (GREEN, "✓", time),
                    Outcome::Cached => (GREEN, "✓", "cached".to_owned()),
                    Outcome::Failed => (RED, "✗", time),
                    Outcome::Cancelled => (YELLOW, "–", "cancelled".to_owned()),
                };
                state.stay(colour, mark, &ended.label, &text, width);
            }
            Event::Warning { text } => state
                .above
                .push(format!("{YELLOW}warning:{RESET} {}", printable(text.as_bytes()))),
            Event::Committing => state.committing = Some(Instant::now()),
        }
    }
}

impl Display for Tty {
    fn finish(&self) {
        self.over.store(true, Ordering::Relaxed);
        if let Some(painter) = self.painter.lock().unwrap_or_else(PoisonError::into_inner).take() {
            let _ = painter.join();
        }
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.running.clear();
        state.committing = None;
        let frame = state.frame(terminal_size());
        let mut out = std::io::stdout().lock();
        let _ = out.write_all(frame.as_bytes()).and_then(|()| out.flush());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn label(text: &str) -> StepLabel {
        StepLabel {
            stage: None,
            number: 2,
            total: 5,
            text: text.into(),
        }
    }

    fn state(steps: usize, output: usize) -> State {
        let mut state = State::default();
        for n in 0..steps {
            let mut running = Running::new(label("RUN x"));
            running.tail = (0..output).map(|n| format!("line {n}")).collect();
            state.running.insert(StepId(u32::try_from(n).unwrap()), running);
        }
        state
    }

    #[test]
    fn the_block_never_exceeds_the_terminal() {
        for (steps, output) in [(1, 6), (3, 6), (10, 6), (40, 6), (0, 0)] {
            let lines = state(steps, output).block(40, 12);
            assert!(lines.len() <= 12, "{steps} steps make {} lines", lines.len());
        }
        assert_eq!(state(1, 6).block(80, 20).len(), 7);
    }

    #[test]
    fn what_is_redrawn_is_erased_first() {
        let mut state = state(1, 2);
        let first = state.frame((60, 20));
        assert!(first.starts_with("\r\x1b[J"));
        state.above.push("done".into());
        let second = state.frame((60, 20));
        assert!(second.starts_with("\x1b[3A\r\x1b[Jdone\n"), "{second:?}");
    }

    #[test]
    fn text_is_cut_to_the_columns_there_are() {
        assert_eq!(fit("abcdef", 4), "abc…");
        assert_eq!(fit("日本語です", 5), "日本…");
        assert_eq!(wide("日本a"), 5);
        let row = row("", "●", &"x".repeat(200), "1 s", 40);
        let bare: String = printable(row.as_bytes());
        assert!(wide(&bare) <= 40, "{bare}");
    }
}

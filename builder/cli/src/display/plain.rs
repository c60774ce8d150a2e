//! Progress as lines: for logs, pipes and people who like to scroll. Every line says which step it belongs to.

use std::collections::HashMap;
use std::io::Write;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use slipway_engine::{Event, Outcome, Progress, StepId, printable};

use super::Display;
use crate::text;

/// How often a transfer is told about.
const TRANSFER_EVERY: Duration = Duration::from_secs(2);

struct Step {
    bracket: String,
    began: Instant,
    told: Option<Instant>,
    transfers: HashMap<String, (u64, u64)>,
}

/// Prints to stdout.
pub struct Plain {
    steps: Mutex<HashMap<StepId, Step>>,
}

impl Plain {
    pub fn new() -> Plain {
        Plain {
            steps: Mutex::default(),
        }
    }

    /// Prints a line. Whatever is in it came from a Dockerfile, an image or a registry: nothing of it may speak to the
    /// terminal.
    fn say(&self, line: &str) {
        // A reader that went away must not end the build.
        let _ = writeln!(std::io::stdout().lock(), "{}", printable(line.as_bytes()));
    }

    fn step_line(&self, steps: &HashMap<StepId, Step>, id: StepId, rest: &str) {
        match steps.get(&id) {
            Some(step) => self.say(&format!("{} {rest}", step.bracket)),
            None => self.say(&format!("[base] {rest}")),
        }
    }
}

impl Progress for Plain {
    fn event(&self, event: Event) {
        let mut steps = self.steps.lock().unwrap_or_else(PoisonError::into_inner);
        match event {
            Event::Started { step, label } => {
                let bracket = label.bracket();
                self.say(&format!("{bracket} {}", label.text));
                let began = Instant::now();
                steps.insert(
                    step,
                    Step {
                        bracket,
                        began,
                        told: None,
                        transfers: HashMap::new(),
                    },
                );
            }
            Event::Output { step, line } => {
                let Some(step) = steps.get(&step) else { return };
                let seconds = step.began.elapsed().as_secs_f64();
                self.say(&format!(
                    "{} {seconds:6.2} {}",
                    step.bracket,
                    String::from_utf8_lossy(&line)
                ));
            }
            Event::Remark { step, text } => self.step_line(&steps, step, &text),
            Event::Transfer {
                step,
                what,
                done,
                total,
            } => {
                let entry = steps.entry(step).or_insert_with(|| Step {
                    bracket: "[base]".to_owned(),
                    began: Instant::now(),
                    told: None,
                    transfers: HashMap::new(),
                });
                entry.transfers.insert(what, (done, total));
                if entry.told.is_some_and(|t| t.elapsed() < TRANSFER_EVERY) {
                    return;
                }
                entry.told = Some(Instant::now());
                let (done, total) = entry
                    .transfers
                    .values()
                    .fold((0, 0), |sum, t| (sum.0 + t.0, sum.1 + t.1));
                self.say(&format!(
                    "{} {} of {}",
                    entry.bracket,
                    text::size(done),
                    text::size(total)
                ));
            }
            Event::Ended {
                step,
                outcome,
                elapsed,
            } => {
                let rest = match outcome {
                    Outcome::Done => format!("done in {}", text::time(elapsed)),
                    Outcome::Cached => "CACHED".to_owned(),
                    Outcome::Failed => format!("failed after {}", text::time(elapsed)),
                    Outcome::Cancelled => "cancelled".to_owned(),
                };
                self.step_line(&steps, step, &rest);
                steps.remove(&step);
            }
            Event::Warning { text } => self.say(&format!("warning: {text}")),
            Event::Committing => {}
        }
    }
}

impl Display for Plain {
    fn finish(&self) {}
}

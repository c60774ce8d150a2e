//! What a build tells while it runs: events for whoever displays them. Knows nothing of terminals.

use std::sync::Arc;
use std::time::Duration;

/// One step of one build; the number is unique in the build, not its place in the stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StepId(pub u32);

/// Where a step stands in its stage, and what it says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StepLabel {
    /// The stage's name; `None` where the Dockerfile has one unnamed stage.
    pub stage: Option<String>,
    /// From 1.
    pub number: u32,
    /// Steps in the stage, FROM included; 0 for the pull of a base image, before the stages are known.
    pub total: u32,
    /// The instruction as shown to the user, on one line.
    pub text: String,
}

impl StepLabel {
    /// `[2/5]`, or `[build 2/5]` in a named stage; `[base]` for what is no step of a stage.
    #[must_use]
    pub fn bracket(&self) -> String {
        match &self.stage {
            _ if self.total == 0 => "[base]".to_owned(),
            Some(stage) => format!("[{stage} {}/{}]", self.number, self.total),
            None => format!("[{}/{}]", self.number, self.total),
        }
    }
}

/// How a step ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It ran.
    Done,
    /// Its result was in the cache.
    Cached,
    /// It failed; the build's error says why.
    Failed,
    /// Another step failed, or the build was interrupted.
    Cancelled,
}

/// What happens in a build, in order.
#[derive(Clone, Debug)]
pub enum Event {
    /// A step begins.
    Started {
        /// The step.
        step: StepId,
        /// How to name it.
        label: StepLabel,
    },
    /// One line (or a part of one, when the line is endless) of a RUN's output, without its line end.
    Output {
        /// The step.
        step: StepId,
        /// Bytes as the command wrote them.
        line: Arc<[u8]>,
    },
    /// A remark on what a step waits for or does now ("pulling", "waiting for another build").
    Remark {
        /// The step.
        step: StepId,
        /// One line.
        text: String,
    },
    /// How far a step is, where that is known.
    Transfer {
        /// The step.
        step: StepId,
        /// What is transferred, for example a layer's short digest.
        what: String,
        /// Bytes so far.
        done: u64,
        /// Bytes in all; 0 when unknown.
        total: u64,
    },
    /// A step ended.
    Ended {
        /// The step.
        step: StepId,
        /// How.
        outcome: Outcome,
        /// Wall time.
        elapsed: Duration,
    },
    /// A remark on the Dockerfile or the build as a whole.
    Warning {
        /// One line, with file and line where there is one.
        text: String,
    },
    /// The last step ended; the image is being recorded.
    Committing,
}

/// Whoever shows a build's events. Called from many threads; must not block for long.
pub trait Progress: Send + Sync {
    /// Takes one event.
    fn event(&self, event: Event);
}

/// Shows nothing.
#[derive(Debug, Default)]
pub struct Silent;

impl Progress for Silent {
    fn event(&self, _: Event) {}
}

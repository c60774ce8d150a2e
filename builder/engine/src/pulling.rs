//! A pull's progress as a build's events.

use crate::progress::{Progress, StepId};

/// Passes one event on.
pub(crate) fn forward(_to: &dyn Progress, _step: StepId, _event: crate::pull_stub::ProgressEvent) {}

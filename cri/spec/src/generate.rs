//! The order in which a specification is made.

use oci_spec::runtime::Spec;

use crate::error::SpecError;
use crate::input::SpecInput;
use crate::process;
use crate::signal::{self, Signal};
use crate::user::ResolvedUser;

/// A container's specification and what the caller needs to know beside it.
#[derive(Debug, Clone)]
pub struct SpecOutput {
    /// The specification.
    pub spec: Spec,
    /// Who the process is.
    pub user: ResolvedUser,
    /// Wishes that were granted only in part (clamped limits, missing capabilities), for the log.
    pub warnings: Vec<String>,
    /// What stops the container: `SIGTERM`, `SIGRTMIN+3`.
    pub stop_signal: String,
    /// The same as a number.
    pub stop_signal_number: u32,
}

/// Makes the OCI runtime specification of a container.
///
/// # Errors
/// A wish that is malformed, dangerous, or more than the host has; the error names its field.
pub fn generate(input: &SpecInput) -> Result<SpecOutput, SpecError> {
    let mut warnings = Vec::new();
    let user = process::user(input)?;
    let stop = stop_signal(input, &mut warnings)?;
    let mut spec = Spec::default();
    spec.set_process(Some(process::process(input, &user, &mut warnings)?));
    Ok(SpecOutput {
        spec,
        user,
        warnings,
        stop_signal: stop.name,
        stop_signal_number: stop.number,
    })
}

/// The request's, else the image's, else SIGTERM. A bad one in the image must not keep it from
/// running.
fn stop_signal(input: &SpecInput, warnings: &mut Vec<String>) -> Result<Signal, SpecError> {
    if let Some(asked) = input.stop_signal.as_deref().filter(|s| !s.is_empty()) {
        return signal::parse(asked)
            .ok_or_else(|| SpecError::invalid("stop_signal", asked, "is not a signal"));
    }
    let image = input.image.stop_signal.as_str();
    if image.is_empty() {
        return Ok(Signal::term());
    }
    Ok(signal::parse(image).unwrap_or_else(|| {
        warnings.push(format!(
            "the image's STOPSIGNAL {image:?} is not a signal: SIGTERM is used"
        ));
        Signal::term()
    }))
}

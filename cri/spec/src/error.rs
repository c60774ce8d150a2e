//! Why a container's wishes cannot be granted. Every variant names the field; the caller adds the
//! container. Nothing here maps to gRPC codes: all of these are the caller's mistakes.

use crate::user::UserError;

/// A wish that cannot be granted, by the field that holds it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SpecError {
    /// Neither the request nor the image says what to run.
    #[error("command: neither the container nor its image says what to run")]
    NoCommand,
    /// A field's value is outside what it may be.
    #[error("{field}: {value:?} {reason}")]
    Invalid {
        /// The field, as the request spells it.
        field: &'static str,
        /// The offending value (never an environment variable's value).
        value: String,
        /// What is wrong with it, as the end of a sentence.
        reason: String,
    },
    /// A user or group cannot be resolved.
    #[error("user")]
    User(#[from] UserError),
    /// A seccomp profile that is not one.
    #[error("seccomp profile: not valid JSON of an OCI or Docker profile")]
    SeccompJson(#[source] serde_json::Error),
    /// The host lacks what was asked.
    #[error("{field}: {value:?} cannot be had on this host: {reason}")]
    Unsupported {
        /// The field, as the request spells it.
        field: &'static str,
        /// The value asked for.
        value: String,
        /// What the host lacks.
        reason: &'static str,
    },
    /// CDI edits that cannot be applied.
    #[error("CDI devices")]
    Cdi(#[from] slipway_cdi::EditError),
}

impl SpecError {
    pub(crate) fn invalid(field: &'static str, value: impl Into<String>, reason: impl Into<String>) -> Self {
        SpecError::Invalid {
            field,
            value: value.into(),
            reason: reason.into(),
        }
    }
}

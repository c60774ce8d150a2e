//! Where log lines go and how they look. It knows no program state; spans are opened at the RPC edge.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::FmtSpan;

use crate::config::{Log, LogFormat};

/// Why the logger could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum LoggingError {
    #[error("log.level {level:?} is no level and no filter")]
    Level {
        level: String,
        source: tracing_subscriber::filter::ParseError,
    },
    #[error("a logger is already set")]
    AlreadySet(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// Installs the process's logger: text or JSON lines on stderr.
pub fn init(log: &Log) -> Result<(), LoggingError> {
    let filter = EnvFilter::try_new(&log.level).map_err(|source| LoggingError::Level {
        level: log.level.clone(),
        source,
    })?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_target(false)
        .with_span_events(FmtSpan::NONE)
        .with_ansi(std::io::stderr().is_terminal());
    match log.format {
        LogFormat::Text => builder.try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    }
    .map_err(LoggingError::AlreadySet)
}

//! libcontainer logs the causes it leaves out of its errors, and its children's errors reach it as one sentence. So its
//! errors' log goes to a file in memory that the children share, and becomes the end of our own error.
//!
//! Nothing is written anywhere else: a container's stderr is the container's.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write as _};
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Metadata, Subscriber, span};

/// What is kept of it.
const MAX_BYTES: u64 = 16 * 1024;

/// The log of this create.
#[derive(Debug)]
pub struct Trace {
    file: File,
}

impl Trace {
    /// Starts catching errors. Once a process.
    pub fn start() -> std::io::Result<Trace> {
        let flags = rustix::fs::MemfdFlags::CLOEXEC;
        let file = File::from(rustix::fs::memfd_create("slipway-runc-trace", flags)?);
        let subscriber = Errors {
            file: file.try_clone()?,
        };
        // There can be one already only in tests.
        let _ = tracing::subscriber::set_global_default(subscriber);
        Ok(Trace { file })
    }

    /// What was caught, oldest first, without repetitions.
    pub fn lines(&mut self) -> Vec<String> {
        let mut text = String::new();
        if self.file.seek(SeekFrom::Start(0)).is_ok() {
            let _ = (&mut self.file).take(MAX_BYTES).read_to_string(&mut text);
        }
        let mut lines: Vec<String> = Vec::new();
        for line in text.lines().filter(|l| !l.is_empty()) {
            if !lines.iter().any(|seen| seen.contains(line)) {
                lines.push(line.to_string());
            }
        }
        lines
    }
}

struct Errors {
    file: File,
}

impl Subscriber for Errors {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_event() && *metadata.level() == Level::ERROR
    }

    fn max_level_hint(&self) -> Option<tracing::level_filters::LevelFilter> {
        Some(tracing::level_filters::LevelFilter::ERROR)
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}

    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut line = Line::default();
        event.record(&mut line);
        let text = format!("{}{}\n", line.message, line.fields).replace(['\r', '\0'], " ");
        // The descriptor is shared over forks, so the offset is too; one write keeps a line whole.
        let _ = (&self.file).write_all(text.as_bytes());
    }

    fn enter(&self, _: &span::Id) {}

    fn exit(&self, _: &span::Id) {}
}

#[derive(Default)]
struct Line {
    message: String,
    fields: String,
}

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        if field.name() == "message" {
            let _ = write!(self.message, "{value:?}");
        } else {
            let _ = write!(self.fields, " {}={value:?}", field.name());
        }
    }
}

//! Where in which file something was written. Knows nothing of what was written there.

use std::fmt;
use std::sync::Arc;

/// A run of lines of one file; lines count from 1 and `end` is included.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Span {
    /// The file's name as the caller gave it to [`crate::parse`].
    pub file: Arc<str>,
    /// The first line. 0 when the file as a whole is meant.
    pub start: u32,
    /// The last line, never less than `start`.
    pub end: u32,
}

impl Span {
    /// Lines `start..=end` of `file`.
    pub fn new(file: &Arc<str>, start: u32, end: u32) -> Span {
        Span {
            file: Arc::clone(file),
            start,
            end: end.max(start),
        }
    }

    /// The file as a whole.
    pub fn whole(file: &Arc<str>) -> Span {
        Span::new(file, 0, 0)
    }
}

/// `Dockerfile:7`, whatever the length of the run: what editors and terminals make a link of.
impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.start == 0 {
            return f.write_str(&self.file);
        }
        write!(f, "{}:{}", self.file, self.start)
    }
}

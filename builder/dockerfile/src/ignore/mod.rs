//! `.dockerignore`: its grammar and which paths it means. Walks no directories.

/// Patterns, the last that matches decides.
#[derive(Debug, Clone)]
pub struct Matcher {}

/// A pattern that cannot be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PatternError {
    /// `!` without anything after it.
    #[error("the exclusion pattern ! is empty")]
    EmptyExclusion,
    /// `[a`, `a\`.
    #[error("the pattern {pattern} is malformed")]
    Malformed {
        /// The pattern.
        pattern: String,
    },
}

/// The patterns of a `.dockerignore`: comments, empty lines and a BOM gone, paths cleaned.
pub fn parse(_source: &[u8]) -> Vec<String> {
    Vec::new()
}

impl Matcher {
    /// A matcher of patterns as [`parse`] returns them, or as `--exclude` gives them.
    ///
    /// # Errors
    /// The first malformed pattern.
    pub fn new<S: AsRef<str>>(_patterns: &[S]) -> Result<Matcher, PatternError> {
        Ok(Matcher {})
    }

    /// Whether the path (relative, `/`-separated) is ignored: it or a directory above it matches, and no
    /// later `!` pattern does.
    pub fn matches_or_parent(&self, _path: &str) -> bool {
        false
    }

    /// Whether nothing below this directory can be wanted, so that a walk need not enter it: it is
    /// ignored, and no `!` pattern can match anything below.
    pub fn skips_directory(&self, _path: &str) -> bool {
        false
    }

    /// Whether there are no patterns at all.
    pub fn is_empty(&self) -> bool {
        true
    }
}

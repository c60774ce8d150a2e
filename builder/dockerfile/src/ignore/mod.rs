//! `.dockerignore`: its grammar and which paths it means. Walks no directories.
//!
//! Patterns are rooted at the context and apply to whatever is below what they match; the last one that
//! matches decides, and one that begins with `!` takes back. `*` and `?` stop at `/`, `**` does not.

mod pattern;

use crate::path;
use pattern::Pattern;

/// Patterns, the last that matches decides.
#[derive(Debug, Clone, Default)]
pub struct Matcher {
    patterns: Vec<(Pattern, bool)>,
}

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

/// Which patterns match a directory or one above it: what is known of everything below it.
#[derive(Debug, Clone, Default)]
pub struct Above {
    matched: Vec<bool>,
}

/// The patterns of a `.dockerignore`: comments, empty lines and a BOM gone, paths cleaned.
pub fn parse(source: &[u8]) -> Vec<String> {
    let source = source.strip_prefix(b"\xef\xbb\xbf").unwrap_or(source);
    let source = String::from_utf8_lossy(source);
    let lines = source
        .lines()
        .filter(|line| !line.starts_with('#'))
        .map(str::trim);
    lines.filter(|line| !line.is_empty()).map(cleaned).collect()
}

fn cleaned(line: &str) -> String {
    let (mark, pattern) = match line.strip_prefix('!') {
        Some(pattern) => ("!", pattern.trim()),
        None => ("", line),
    };
    if pattern.is_empty() {
        return mark.to_owned();
    }
    let pattern = path::clean(pattern);
    let pattern = pattern
        .strip_prefix('/')
        .filter(|rest| !rest.is_empty())
        .unwrap_or(&pattern);
    format!("{mark}{pattern}")
}

impl Matcher {
    /// A matcher of patterns as [`parse`] returns them, or as `--exclude` gives them.
    ///
    /// # Errors
    /// The first malformed pattern.
    pub fn new<S: AsRef<str>>(patterns: &[S]) -> Result<Matcher, PatternError> {
        let mut matcher = Matcher::default();
        for written in patterns {
            let written = written.as_ref().trim();
            if written.is_empty() {
                continue;
            }
            let (text, exception) = match written.strip_prefix('!') {
                Some(rest) => (rest, true),
                None => (written, false),
            };
            if text.is_empty() || (exception && text == "/") {
                return Err(PatternError::EmptyExclusion);
            }
            let malformed = || PatternError::Malformed {
                pattern: written.to_owned(),
            };
            let pattern = Pattern::new(&path::clean(text)).ok_or_else(malformed)?;
            matcher.patterns.push((pattern, exception));
        }
        Ok(matcher)
    }

    /// Whether the path (relative, `/`-separated) is ignored: it or a directory above it matches, and no
    /// later `!` pattern does. The context's root, `.`, never is.
    pub fn matches_or_parent(&self, path: &str) -> bool {
        self.decide(path).is_some_and(|(_, ignored)| ignored)
    }

    /// As [`Matcher::matches_or_parent`] for a walk from the root down, which does not look at the directories
    /// above a path again and again: `above` is what this gave for the path's directory, the default for the root's.
    pub fn matches_below(&self, path: &str, above: &Above) -> (bool, Above) {
        let path = path::clean(path);
        let mut ignored = false;
        let matched = self
            .patterns
            .iter()
            .enumerate()
            .map(|(at, (pattern, exception))| {
                let matched = above.matched.get(at).copied().unwrap_or_default() || pattern.matches(&path);
                if matched {
                    ignored = !exception;
                }
                matched
            });
        let matched = matched.collect();
        (ignored, Above { matched })
    }

    /// Whether nothing below this directory can be wanted, so that a walk need not enter it: it is
    /// ignored, and no later `!` pattern can match anything below.
    pub fn skips_directory(&self, path: &str) -> bool {
        let path = path::clean(path);
        let Some((deciding, true)) = self.decide(&path) else {
            return false;
        };
        let below = format!("{path}/");
        !self.patterns[deciding + 1..]
            .iter()
            .any(|(pattern, exception)| *exception && pattern.may_match_below(&below))
    }

    /// The last pattern that matches the path or a directory above it, and what it makes of it.
    fn decide(&self, path: &str) -> Option<(usize, bool)> {
        let path = path::clean(path);
        if path == "." {
            return None;
        }
        let ends: Vec<usize> = path
            .match_indices('/')
            .map(|(at, _)| at)
            .filter(|at| *at > 0)
            .chain([path.len()])
            .collect();
        let matches = |pattern: &Pattern| ends.iter().rev().any(|end| pattern.matches(&path[..*end]));
        let last = self
            .patterns
            .iter()
            .enumerate()
            .rev()
            .find(|(_, (pattern, _))| matches(pattern));
        last.map(|(at, (_, exception))| (at, !exception))
    }

    /// Whether there are no patterns at all.
    pub fn is_empty(&self) -> bool {
        self.patterns.is_empty()
    }

    /// Whether there are `!` patterns.
    pub fn has_exceptions(&self) -> bool {
        self.patterns.iter().any(|(_, exception)| *exception)
    }

    /// Whether one pattern means everything there is.
    pub(crate) fn ignores_everything(&self) -> bool {
        self.patterns
            .iter()
            .any(|(pattern, exception)| !exception && pattern.is_everything())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matcher(file: &str) -> Matcher {
        Matcher::new(&parse(file.as_bytes())).unwrap()
    }

    #[test]
    fn a_file_is_read_line_by_line() {
        let file = "\u{feff}# comment\n  # not one \na/./b/\r\n\n/c\n! /d\n!\n/\n";
        assert_eq!(parse(file.as_bytes()), ["# not one", "a/b", "c", "!d", "!", "/"]);
        assert_eq!(Matcher::new(&["!"]).unwrap_err(), PatternError::EmptyExclusion);
    }

    #[test]
    fn patterns_are_rooted_and_reach_down() {
        let ignore = matcher("foo\n*.log\nlogs/**/x\n");
        assert!(ignore.matches_or_parent("foo") && ignore.matches_or_parent("foo/a/b"));
        assert!(!ignore.matches_or_parent("a/foo") && !ignore.matches_or_parent("a/b.log"));
        assert!(ignore.matches_or_parent("logs/x") && ignore.matches_or_parent("logs/a/b/x/y"));
        assert!(!matcher("**").matches_or_parent("."));
    }

    #[test]
    fn a_walk_down_decides_as_each_path_alone() {
        let ignore = matcher("a\n!a/b\na/b/c*\n!**/keep\n*/x?\n");
        for path in ["a/b/c/keep/z", "a/q", "a/b", "a/b/d", "b/x1/keep", "b/x1/y"] {
            let mut above = Above::default();
            let mut ignored = false;
            for (at, _) in path.match_indices('/').chain([(path.len(), "")]) {
                (ignored, above) = ignore.matches_below(&path[..at], &above);
            }
            assert_eq!(ignored, ignore.matches_or_parent(path), "{path}");
        }
    }

    #[test]
    fn a_directory_is_entered_only_for_an_exception() {
        let ignore = matcher("node_modules\n.git\nsrc\n!src/keep/*.rs\nbuild\n!build\nbuild/tmp\n");
        assert!(ignore.skips_directory("node_modules") && ignore.skips_directory(".git/objects"));
        assert!(!ignore.skips_directory("src") && !ignore.skips_directory("src/keep"));
        assert!(ignore.skips_directory("src/other") && ignore.skips_directory("build/tmp"));
        assert!(!ignore.skips_directory("build") && !ignore.skips_directory("docs"));
        assert!(!matcher("a\n!**/x").skips_directory("a/b/c"));
        assert!(!matcher("a\n!a**").skips_directory("a/b"));
        assert!(matcher("!a/b\na").skips_directory("a"));
    }
}

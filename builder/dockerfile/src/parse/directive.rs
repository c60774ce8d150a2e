//! Parser directives: comments of the form `# name=value` above everything else.

use crate::ast::Directives;
use crate::error::Problem;

/// Takes the comment lines at the top of a file, one after the other.
#[derive(Default)]
pub(super) struct DirectiveReader {
    directives: Directives,
    escape_seen: bool,
    first_seen: bool,
    /// `#!` came first: what follows are directives to tools, but `escape` is not ours to obey any more.
    shebang: bool,
    ended: bool,
}

impl DirectiveReader {
    /// Reads a comment line, `#` not included, and says whether it was a directive.
    pub(super) fn line(&mut self, comment: &str) -> Result<bool, Problem> {
        if !std::mem::replace(&mut self.first_seen, true) && comment.starts_with('!') {
            self.shebang = true;
            return Ok(false);
        }
        if self.ended {
            return Ok(false);
        }
        let Some((name, value)) = directive(comment) else {
            self.ended = true;
            return Ok(false);
        };
        let seen = match name.as_str() {
            "syntax" => self.directives.syntax.is_some(),
            "check" => self.directives.check.is_some(),
            "escape" => self.escape_seen,
            _ => {
                self.ended = true;
                return Ok(false);
            }
        };
        if seen {
            return Err(Problem::DuplicateDirective { name });
        }
        match name.as_str() {
            "syntax" => self.directives.syntax = Some(value.to_owned()),
            // What stands after a space is a remark.
            "check" => self.directives.check = value.split(' ').next().map(str::to_owned),
            _ => {
                self.escape_seen = true;
                let escape = match value {
                    "\\" => '\\',
                    "`" => '`',
                    _ => {
                        return Err(Problem::BadEscape {
                            value: value.to_owned(),
                        });
                    }
                };
                if !self.shebang {
                    self.directives.escape = escape;
                }
            }
        }
        Ok(true)
    }

    /// Something else than a comment came: there are no directives any more.
    pub(super) fn end(&mut self) {
        self.ended = true;
    }

    pub(super) fn escape(&self) -> char {
        self.directives.escape
    }

    pub(super) fn finish(self) -> Directives {
        self.directives
    }
}

/// The name in lower case and the value of `name = value`.
pub(crate) fn directive(comment: &str) -> Option<(String, &str)> {
    let (name, value) = comment.trim().split_once('=')?;
    let (name, value) = (name.trim_end(), value.trim_start());
    let sound = name.starts_with(|c: char| c.is_ascii_alphabetic())
        && name.chars().all(|c| c.is_ascii_alphanumeric())
        && !value.is_empty();
    sound.then(|| (name.to_ascii_lowercase(), value))
}

#[cfg(test)]
mod tests {
    use crate::parse;

    #[test]
    fn directives_end_at_the_first_line_that_is_none() {
        let read = |source: &str| parse(source.as_bytes(), "D").unwrap().directives;
        let all = read("# Syntax = docker/dockerfile:1\n#escape=`\n# check=skip=all // why\nFROM a\n");
        assert_eq!(all.syntax.as_deref(), Some("docker/dockerfile:1"));
        assert_eq!((all.escape, all.check.as_deref()), ('`', Some("skip=all")));
        assert_eq!(read("# a remark\n# escape=`\nFROM a\n").escape, '\\');
        assert_eq!(read("\n# escape=`\nFROM a\n").escape, '\\');
        assert_eq!(read("# unknown=1\n# escape=`\nFROM a\n").escape, '\\');
    }

    #[test]
    fn a_directive_comes_once() {
        let failed = parse(b"# escape=`\n# escape=`\nFROM a", "D").unwrap_err();
        assert_eq!(failed.to_string(), "D:2: the directive escape is given twice");
    }
}

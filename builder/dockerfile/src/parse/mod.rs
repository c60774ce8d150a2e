//! From bytes to the syntax tree: lines, continuations, comments, directives, heredocs. Knows no
//! instruction beyond how its arguments are split (`split`).

mod directive;
mod heredoc;
mod split;

pub(crate) use directive::directive;
pub(crate) use heredoc::marker;

use crate::ast::{Args, Ast, Node};
use crate::error::{Error, ParseError, Problem};
use crate::span::Span;
use directive::DirectiveReader;
use std::borrow::Cow;
use std::sync::Arc;

/// How large a Dockerfile may be.
pub const FILE_LIMIT: usize = 1 << 20;

/// How long one line of it may be, its newline not counted.
pub const LINE_LIMIT: usize = 65_535;

/// Reads a Dockerfile. `file_name` is what errors call it.
///
/// # Errors
/// The first line that cannot be read, or [`Problem::Empty`] where there are no instructions. An
/// instruction that is unknown or wrong is not found here but by [`crate::instruction::decode`].
pub fn parse(source: &[u8], file_name: &str) -> Result<Ast, ParseError> {
    let file: Arc<str> = file_name.into();
    if source.len() > FILE_LIMIT {
        let problem = Problem::FileTooLarge {
            size: source.len(),
            limit: FILE_LIMIT,
        };
        return Err(Error::new(&Span::whole(&file), problem));
    }
    if source.starts_with(&[0xff, 0xfe]) || source.starts_with(&[0xfe, 0xff]) {
        return Err(Error::new(&Span::whole(&file), Problem::Utf16));
    }
    let source = source.strip_prefix(b"\xef\xbb\xbf").unwrap_or(source);
    let mut reader = Reader {
        file,
        lines: source.split_inclusive(is_newline).collect(),
        at: 0,
    };
    reader.file()
}

fn is_newline(byte: &u8) -> bool {
    *byte == b'\n'
}

struct Reader<'a> {
    file: Arc<str>,
    lines: Vec<&'a [u8]>,
    /// How many lines were read: the number of the line read last.
    at: usize,
}

impl<'a> Reader<'a> {
    fn file(&mut self) -> Result<Ast, Error> {
        let mut directives = DirectiveReader::default();
        let mut nodes = Vec::new();
        let mut empty_continuations = Vec::new();
        let mut comments: Vec<String> = Vec::new();
        while let Some(raw) = self.next()? {
            let line = trim_start(raw);
            if let Some(comment) = comment(line) {
                if directives.line(&comment).map_err(|p| self.error(self.at, p))? {
                    continue;
                }
                // An empty comment line parts what is above from what is below.
                match comment.trim() {
                    "" => comments.clear(),
                    text => comments.push(text.to_owned()),
                }
                continue;
            }
            directives.end();
            if line.is_empty() {
                continue;
            }
            let start = self.at;
            let (text, has_empty_line) = self.joined(line, directives.escape())?;
            if has_empty_line {
                empty_continuations.push(self.at as u32);
            }
            let comments = std::mem::take(&mut comments);
            nodes.push(self.node(text, start, comments, directives.escape())?);
        }
        if nodes.is_empty() {
            return Err(Error::new(&Span::whole(&self.file), Problem::Empty));
        }
        Ok(Ast {
            file: Arc::clone(&self.file),
            directives: directives.finish(),
            nodes,
            empty_continuations,
        })
    }

    /// The next line without its line ending.
    fn next(&mut self) -> Result<Option<&'a [u8]>, Error> {
        Ok(self.next_raw()?.map(without_newline))
    }

    fn next_raw(&mut self) -> Result<Option<&'a [u8]>, Error> {
        let Some(raw) = self.lines.get(self.at).copied() else {
            return Ok(None);
        };
        self.at += 1;
        let size = without_newline(raw).len();
        if size > LINE_LIMIT {
            return Err(self.error(
                self.at,
                Problem::LineTooLong {
                    size,
                    limit: LINE_LIMIT,
                },
            ));
        }
        Ok(Some(raw))
    }

    /// The instruction that starts with `first`, its continuations appended: comment lines and empty
    /// lines between them are left out. Says whether there was an empty one.
    fn joined(&mut self, first: &[u8], escape: char) -> Result<(String, bool), Error> {
        let mut text = String::new();
        let mut has_empty_line = false;
        let mut more = self.append(&mut text, first, escape)?;
        while more {
            let Some(line) = self.next()? else { break };
            let trimmed = trim_start(line);
            if comment(trimmed).is_some() {
                continue;
            }
            if trimmed.is_empty() {
                has_empty_line = true;
                continue;
            }
            more = self.append(&mut text, line, escape)?;
        }
        Ok((text, has_empty_line))
    }

    /// Appends a line without its continuation mark and says whether it had one.
    fn append(&self, text: &mut String, line: &[u8], escape: char) -> Result<bool, Error> {
        let line = std::str::from_utf8(line).map_err(|_| self.error(self.at, Problem::NotUtf8))?;
        if line.contains('\0') {
            return Err(self.error(self.at, Problem::Nul));
        }
        // The mark is the escape character at the end, spaces after it ignored, unless it is itself escaped.
        let end = line.trim_end_matches([' ', '\t']);
        let rest = end.strip_suffix(escape).filter(|rest| !rest.ends_with(escape));
        text.push_str(rest.unwrap_or(line));
        Ok(rest.is_some())
    }

    fn node(
        &mut self,
        text: String,
        start: usize,
        comments: Vec<String>,
        escape: char,
    ) -> Result<Node, Error> {
        let span = |end| Span::new(&self.file, start as u32, end as u32);
        let mut node = split::statement(&text, escape, span(self.at))?;
        node.comments = comments;
        if !may_hold_heredocs(&node) || !text.contains("<<") {
            return Ok(node);
        }
        for mut heredoc in heredoc::markers(&text).map_err(|p| Error::new(&node.span, p))? {
            loop {
                let Some(raw) = self.next_raw()? else {
                    let problem = Problem::UnterminatedHeredoc { name: heredoc.name };
                    return Err(self.error(start, problem));
                };
                let line = std::str::from_utf8(raw).map_err(|_| self.error(self.at, Problem::NotUtf8))?;
                let end = line.trim_end_matches(['\r', '\n']);
                let end = if heredoc.chomp {
                    end.trim_start_matches('\t')
                } else {
                    end
                };
                if end == heredoc.name {
                    break;
                }
                heredoc.content.push_str(line);
            }
            node.heredocs.push(heredoc);
        }
        node.span = Span::new(&self.file, start as u32, self.at as u32);
        Ok(node)
    }

    fn error(&self, line: usize, problem: Problem) -> Error {
        Error::new(&Span::new(&self.file, line as u32, line as u32), problem)
    }
}

fn without_newline(line: &[u8]) -> &[u8] {
    let end = line.iter().rposition(|b| !matches!(b, b'\r' | b'\n'));
    &line[..end.map_or(0, |e| e + 1)]
}

// White space as Unicode has it, as far as the line is Unicode: a comment may be in another encoding.
fn trim_start(line: &[u8]) -> &[u8] {
    let readable = match std::str::from_utf8(line) {
        Ok(text) => text,
        Err(error) => std::str::from_utf8(&line[..error.valid_up_to()]).unwrap_or_default(),
    };
    &line[readable.len() - readable.trim_start().len()..]
}

/// What stands after `#`, where the line is a comment. Comments may be in any encoding.
fn comment(line: &[u8]) -> Option<Cow<'_, str>> {
    line.strip_prefix(b"#").map(String::from_utf8_lossy)
}

fn may_hold_heredocs(node: &Node) -> bool {
    let node = match &node.args {
        Args::Trigger(trigger) => trigger,
        _ => node,
    };
    let keyword = node.keyword.to_ascii_lowercase();
    matches!(keyword.as_str(), "add" | "copy" | "run") && !node.json
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(source: &str) -> Vec<(String, u32, u32)> {
        let ast = parse(source.as_bytes(), "Dockerfile").unwrap();
        ast.nodes
            .into_iter()
            .map(|n| (n.original, n.span.start, n.span.end))
            .collect()
    }

    fn error(source: impl AsRef<[u8]>) -> String {
        parse(source.as_ref(), "Dockerfile").unwrap_err().to_string()
    }

    #[test]
    fn comments_and_empty_lines_inside_a_continuation_are_left_out() {
        let source = "FROM a\nRUN one \\\n  # why\n\n  && two\nRUN three\n";
        let expected = [("FROM a", 1, 1), ("RUN one   && two", 2, 5), ("RUN three", 6, 6)];
        assert_eq!(lines(source), expected.map(|(t, s, e)| (t.to_owned(), s, e)));
        assert_eq!(parse(source.as_bytes(), "D").unwrap().empty_continuations, [5]);
    }

    #[test]
    fn a_byte_order_mark_and_crlf_change_nothing() {
        let unix = "# escape=`\nFROM a\nRUN x `\n  y\n";
        let dos = format!("\u{feff}{}", unix.replace('\n', "\r\n"));
        assert_eq!(lines(&dos), lines(unix));
    }

    #[test]
    fn an_escaped_escape_does_not_continue_the_line() {
        let source = "FROM a\nRUN x \\\\\nRUN y\n";
        assert_eq!(lines(source)[1].0, "RUN x \\\\");
    }

    #[test]
    fn errors_say_the_line() {
        assert_eq!(error(""), "Dockerfile: the file has no instructions");
        assert_eq!(
            error("# escape=x\nFROM a"),
            "Dockerfile:1: the escape directive can be \\ or `, not x"
        );
        assert_eq!(error("FROM a\nENV X"), "Dockerfile:2: ENV needs a value after X");
        assert_eq!(
            error("FROM a\n\nRUN <<E\nx\n"),
            "Dockerfile:3: the heredoc <<E is never ended by a line that says E"
        );
        assert_eq!(
            error(b"FROM a\nRUN \xff\n"),
            "Dockerfile:2: the line is not UTF-8"
        );
        assert_eq!(
            error("FROM a\nRUN a\0b"),
            "Dockerfile:2: the line contains a NUL byte"
        );
        assert!(error(b"\xff\xfeF\0").contains("UTF-16"));
        let long = format!("FROM a\nLABEL test={}\n", "a".repeat(LINE_LIMIT));
        assert_eq!(
            error(long),
            "Dockerfile:2: the line has 65546 bytes, the limit is 65535"
        );
        assert!(error(vec![b'#'; FILE_LIMIT + 1]).contains("the limit is 1048576"));
    }

    #[test]
    fn any_white_space_makes_an_empty_line() {
        assert_eq!(
            lines("\x0b\n\u{a0}\u{2003}\nFROM a\n \x0c\n\u{a0}RUN x\n").len(),
            2
        );
    }

    #[test]
    fn comments_may_be_in_any_encoding() {
        let source = b"# na\xefve\nFROM a\nRUN x \\\n # \xe9t\xe9\n y\n";
        assert!(parse(source, "Dockerfile").is_ok());
    }

    #[test]
    fn heredocs_belong_to_triggers_too() {
        let source = "FROM a\nONBUILD RUN <<A <<-B\none\nA\n\ttwo\n\tB\nRUN x\n";
        let ast = parse(source.as_bytes(), "Dockerfile").unwrap();
        let bodies: Vec<String> = ast.nodes[1].heredocs.iter().map(|h| h.text()).collect();
        assert_eq!(bodies, ["one\n", "two\n"]);
        assert_eq!((ast.nodes[1].span.start, ast.nodes[1].span.end), (2, 6));
        assert_eq!(ast.nodes.len(), 3);
    }
}

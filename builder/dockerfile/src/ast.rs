//! What a Dockerfile's text says, line by line, before anything is understood: keyword, flags,
//! arguments, heredocs. Knows nothing of what instructions mean.

use crate::span::Span;
use std::fmt::Write as _;
use std::sync::Arc;

/// A parsed Dockerfile.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ast {
    /// The name given to [`crate::parse`].
    pub file: Arc<str>,
    /// The parser directives at the top.
    pub directives: Directives,
    /// The instructions in the order of the file, never empty.
    pub nodes: Vec<Node>,
    /// Lines on which an instruction ends that has empty lines inside a continuation.
    pub empty_continuations: Vec<u32>,
}

/// `# syntax=`, `# escape=`, `# check=`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Directives {
    /// The frontend asked for; ours serves all of them, so this is for display only.
    pub syntax: Option<String>,
    /// `\` or `` ` ``.
    pub escape: char,
    /// Options of the checks.
    pub check: Option<String>,
}

impl Default for Directives {
    fn default() -> Directives {
        Directives {
            syntax: None,
            escape: '\\',
            check: None,
        }
    }
}

/// One instruction as written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// The keyword in the author's case.
    pub keyword: String,
    /// `--name=value`, quotes gone.
    pub flags: Vec<String>,
    /// What follows the flags.
    pub args: Args,
    /// Whether `args` were written as a JSON array.
    pub json: bool,
    /// Heredocs in the order of their markers.
    pub heredocs: Vec<Heredoc>,
    /// The whole instruction on one line: continuations joined, comments inside dropped, without heredoc bodies.
    pub original: String,
    /// Where it stands, heredoc bodies included.
    pub span: Span,
    /// The comment lines directly above, without `#`.
    pub comments: Vec<String>,
}

/// The arguments of an instruction, split as its grammar asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Args {
    /// Nothing was written.
    None,
    /// Words, or one unsplit string, or the strings of a JSON array; HEALTHCHECK: its type, then its command.
    Words(Vec<String>),
    /// ENV and LABEL; values keep their quotes.
    Pairs(Vec<Pair>),
    /// The trigger of ONBUILD.
    Trigger(Box<Node>),
}

/// `key=value`, or `key value` in the legacy form.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pair {
    /// The name.
    pub key: String,
    /// The value.
    pub value: String,
    /// Written without `=`.
    pub legacy: bool,
}

/// A document inside the Dockerfile: `<<EOF … EOF`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Heredoc {
    /// The word that ends it, quotes gone.
    pub name: String,
    /// The lines between, each with its newline, as written.
    pub content: String,
    /// Whether variables in it are expanded: no part of the marker was quoted.
    pub expand: bool,
    /// `<<-`: leading tabs go.
    pub chomp: bool,
    /// The descriptor of `3<<EOF`; 0 where none is written.
    pub fd: u32,
}

impl Heredoc {
    /// The content as the instruction gets it: without leading tabs where `<<-` asks for that.
    pub fn text(&self) -> String {
        if !self.chomp {
            return self.content.clone();
        }
        self.content
            .split_inclusive('\n')
            .map(|line| line.trim_start_matches('\t'))
            .collect()
    }
}

impl Ast {
    /// The S-expression form that BuildKit's parser tests use: one `(keyword "arg" …)` a line.
    pub fn dump(&self) -> String {
        self.nodes
            .iter()
            .map(|node| format!("({})\n", node.dump()))
            .collect()
    }
}

impl Node {
    fn dump(&self) -> String {
        let mut out = self.keyword.to_lowercase();
        if !self.flags.is_empty() {
            let flags: Vec<String> = self.flags.iter().map(|f| go_quote(f)).collect();
            let _ = write!(out, " [{}]", flags.join(" "));
        }
        match &self.args {
            Args::None => {}
            Args::Words(words) => words.iter().for_each(|w| {
                let _ = write!(out, " {}", go_quote(w));
            }),
            Args::Pairs(pairs) => pairs.iter().for_each(|p| {
                let separator = if p.legacy { "" } else { "=" };
                let _ = write!(
                    out,
                    " {} {} {}",
                    go_quote(&p.key),
                    go_quote(&p.value),
                    go_quote(separator)
                );
            }),
            Args::Trigger(node) => {
                let _ = write!(out, " ({})", node.dump());
            }
        }
        out.trim().to_owned()
    }
}

/// A string as Go's `%q` prints it.
pub(crate) fn go_quote(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 2);
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\t' => out.push_str("\\t"),
            '\r' => out.push_str("\\r"),
            '\x07' => out.push_str("\\a"),
            '\x08' => out.push_str("\\b"),
            '\x0b' => out.push_str("\\v"),
            '\x0c' => out.push_str("\\f"),
            c if (c as u32) < 0x20 || c as u32 == 0x7f => {
                let _ = write!(out, "\\x{:02x}", c as u32);
            }
            c if !is_go_printable(c) && (c as u32) < 0x10000 => {
                let _ = write!(out, "\\u{:04x}", c as u32);
            }
            c if !is_go_printable(c) => {
                let _ = write!(out, "\\U{:08x}", c as u32);
            }
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

// Approximates Go's strconv.IsPrint: what matters are controls, separators, surrogates and private use.
fn is_go_printable(c: char) -> bool {
    let private = matches!(c as u32, 0xe000..=0xf8ff | 0xf0000..=0x10ffff);
    let invisible = matches!(c as u32, 0xad | 0x200b..=0x200f | 0x2028..=0x202e | 0x2060..=0x206f | 0xfeff | 0xfff0..=0xfffb);
    !(c.is_control() || private || invisible || (c.is_whitespace() && c != ' '))
}

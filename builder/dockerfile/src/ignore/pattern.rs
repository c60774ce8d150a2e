//! One pattern: what it matches.

use std::str::Chars;

#[derive(Debug, Clone)]
pub(super) enum Pattern {
    /// No wildcards.
    Exact(String),
    /// `text**`
    Prefix(String),
    /// `**text`: the whole end of a path, not only whole names.
    Suffix(String),
    /// Anything else.
    Glob(Vec<Token>),
}

#[derive(Debug, Clone)]
pub(super) enum Token {
    Literal(char),
    /// `?`: one character, not `/`.
    One,
    /// `*`: any number of them.
    Many,
    /// `**` at the end: anything.
    Rest,
    /// `**/`, or `**` before something: nothing, or anything that ends in `/`.
    Directories,
    /// `[a-z]`, `[^a-z]`.
    Class(bool, Vec<(char, char)>),
}

impl Pattern {
    /// Reads a clean pattern; None where it is malformed.
    pub(super) fn new(text: &str) -> Option<Pattern> {
        let mut tokens = Vec::new();
        let mut plain = true;
        let mut chars = text.chars();
        while let Some(c) = chars.next() {
            tokens.push(match c {
                '*' if chars.as_str().starts_with('*') => {
                    chars.next();
                    if chars.as_str().starts_with('/') {
                        chars.next();
                    }
                    if chars.as_str().is_empty() {
                        Token::Rest
                    } else {
                        Token::Directories
                    }
                }
                '*' => Token::Many,
                '?' => Token::One,
                '[' => class(&mut chars)?,
                '\\' => {
                    plain = false;
                    Token::Literal(chars.next()?)
                }
                c => Token::Literal(c),
            });
        }
        let literal = |tokens: &[Token]| plain && tokens.iter().all(|t| matches!(t, Token::Literal(_)));
        Some(match &tokens[..] {
            all if literal(all) => Pattern::Exact(text.to_owned()),
            [Token::Rest] => Pattern::Suffix(String::new()),
            [start @ .., Token::Rest] if literal(start) => Pattern::Prefix(text[..text.len() - 2].to_owned()),
            [Token::Directories, end @ ..] if literal(end) => Pattern::Suffix(text[2..].to_owned()),
            _ => Pattern::Glob(tokens),
        })
    }

    pub(super) fn matches(&self, path: &str) -> bool {
        match self {
            Pattern::Exact(text) => path == text,
            Pattern::Prefix(text) => path.starts_with(text),
            Pattern::Suffix(text) => path.ends_with(text) || text.strip_prefix('/') == Some(path),
            Pattern::Glob(tokens) => States::after(tokens, path).at(tokens.len()),
        }
    }

    /// Whether it may match something that begins with `directory` (which ends in `/`).
    pub(super) fn may_match_below(&self, directory: &str) -> bool {
        match self {
            Pattern::Exact(text) => text.starts_with(directory),
            Pattern::Prefix(text) => text.starts_with(directory) || directory.starts_with(text),
            Pattern::Suffix(_) => true,
            Pattern::Glob(tokens) => States::after(tokens, directory).alive(tokens.len()),
        }
    }

    pub(super) fn is_everything(&self) -> bool {
        match self {
            Pattern::Suffix(text) => text.is_empty(),
            Pattern::Glob(tokens) => matches!(tokens[..], [Token::Many] | [Token::Directories, Token::Many]),
            _ => false,
        }
    }
}

// A class is what Go's filepath.Match takes for one: at least one range, `\` escapes.
fn class(chars: &mut Chars<'_>) -> Option<Token> {
    let negated = chars.as_str().starts_with('^');
    if negated {
        chars.next();
    }
    let mut ranges = Vec::new();
    loop {
        let rest = chars.as_str();
        if rest.starts_with(']') && !ranges.is_empty() {
            chars.next();
            return Some(Token::Class(negated, ranges));
        }
        let first = class_character(chars)?;
        let last = match chars.as_str().starts_with('-') {
            true => {
                chars.next();
                class_character(chars)?
            }
            false => first,
        };
        if first > last {
            return None;
        }
        ranges.push((first, last));
    }
}

fn class_character(chars: &mut Chars<'_>) -> Option<char> {
    match chars.next()? {
        '-' | ']' => None,
        '\\' => chars.next(),
        c => Some(c),
    }
}

/// Where in a glob one can stand after some text: before which tokens, and inside which `Directories`.
/// All places at once, so that no pattern takes longer than its length times the path's.
struct States {
    before: Vec<bool>,
    inside: Vec<bool>,
}

impl States {
    fn after(tokens: &[Token], text: &str) -> States {
        let none = || vec![false; tokens.len() + 1];
        let mut states = States {
            before: none(),
            inside: none(),
        };
        states.before[0] = true;
        states.skip_empty(tokens);
        for c in text.chars() {
            let mut next = States {
                before: none(),
                inside: none(),
            };
            for (at, token) in tokens.iter().enumerate() {
                let (here, inside) = (states.before[at], states.inside[at]);
                match token {
                    Token::Literal(literal) => next.before[at + 1] |= here && *literal == c,
                    Token::One => next.before[at + 1] |= here && c != '/',
                    Token::Many => next.before[at] |= here && c != '/',
                    Token::Rest => next.before[at] |= here,
                    Token::Class(negated, ranges) => {
                        let found = ranges.iter().any(|(first, last)| (*first..=*last).contains(&c));
                        next.before[at + 1] |= here && found != *negated;
                    }
                    Token::Directories => {
                        next.inside[at] |= here || inside;
                        next.before[at + 1] |= (here || inside) && c == '/';
                    }
                }
            }
            next.skip_empty(tokens);
            states = next;
        }
        states
    }

    /// Tokens that may stand for nothing can be stepped over.
    fn skip_empty(&mut self, tokens: &[Token]) {
        for (at, token) in tokens.iter().enumerate() {
            let may_be_empty = matches!(token, Token::Many | Token::Rest | Token::Directories);
            self.before[at + 1] |= self.before[at] && may_be_empty;
        }
    }

    fn at(&self, end: usize) -> bool {
        self.before[end]
    }

    /// Whether more text can still lead to a match.
    fn alive(&self, end: usize) -> bool {
        self.inside.iter().chain(&self.before[..end]).any(|state| *state)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matches(pattern: &str, path: &str) -> bool {
        Pattern::new(pattern).unwrap().matches(path)
    }

    #[test]
    fn braces_and_parentheses_mean_themselves() {
        assert!(matches("a{b}(c)|$.+", "a{b}(c)|$.+") && !matches("a.c*", "abc"));
        assert!(matches(r"a\*b", "a*b") && !matches(r"a\*b", "axb"));
    }

    #[test]
    fn a_hostile_pattern_ends() {
        let pattern = "*a**/".repeat(200) + "b";
        assert!(!matches(&pattern, &"a/".repeat(2000)));
    }
}

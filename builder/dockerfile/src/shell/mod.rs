//! Words as a POSIX shell reads them: quotes, escapes, `$name` and `${name…}`. Knows no
//! instructions; variables come from an [`Environment`].
//!
//! Substitutions: `${v}` `${v:-w}` `${v-w}` `${v:+w}` `${v+w}` `${v:?w}` `${v?w}` `${v#p}` `${v##p}`
//! `${v%p}` `${v%%p}` `${v/p/r}` `${v//p/r}`; patterns know `*`, `?` and `\`.

mod pattern;

use crate::error::ExpansionProblem;
use pattern::Pattern;
use std::collections::{BTreeMap, BTreeSet};

/// How many bytes one word may grow to.
pub const WORD_LIMIT: usize = 1 << 20;

// `${a:-${b:-…}}`: deeper than anybody writes, shallow enough for any thread's stack.
const DEPTH_LIMIT: usize = 64;

/// Where variables come from.
pub trait Environment {
    /// The variable's value, None where it is not set.
    fn get(&self, name: &str) -> Option<&str>;
}

impl Environment for BTreeMap<String, String> {
    fn get(&self, name: &str) -> Option<&str> {
        BTreeMap::get(self, name).map(String::as_str)
    }
}

impl Environment for [(String, String)] {
    fn get(&self, name: &str) -> Option<&str> {
        self.iter()
            .rev()
            .find(|(k, _)| k == name)
            .map(|(_, v)| v.as_str())
    }
}

/// No variable is set.
pub struct NoVariables;

impl Environment for NoVariables {
    fn get(&self, _name: &str) -> Option<&str> {
        None
    }
}

/// How words are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lexer {
    /// `\`, or `` ` `` by the directive of that name.
    pub escape: char,
    /// Quotes stay in the result.
    pub keep_quotes: bool,
    /// Escape characters stay in the result.
    pub keep_escapes: bool,
    /// Quotes are ordinary characters.
    pub ignore_quotes: bool,
    /// Variables that are not set stay as they are written.
    pub keep_unset: bool,
}

/// A word after expansion.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ProcessWithMatches {
    /// The expansion as one string.
    pub text: String,
    /// The expansion split at spaces that are not quoted.
    pub words: Vec<String>,
    /// Variables it used that are set.
    pub matched: BTreeSet<String>,
    /// Variables it used that are not set.
    pub unmatched: BTreeSet<String>,
}

/// Expands `word` to one string.
///
/// # Errors
/// Unclosed quotes and braces, unknown substitutions, `${v:?}` without a value.
pub fn process_word(word: &str, escape: char, env: &dyn Environment) -> Result<String, ExpansionProblem> {
    Ok(Lexer::new(escape).process(word, env)?.text)
}

/// Expands `word`, then splits it at spaces that are not quoted.
///
/// # Errors
/// As [`process_word`].
pub fn process_words(
    word: &str,
    escape: char,
    env: &dyn Environment,
) -> Result<Vec<String>, ExpansionProblem> {
    Ok(Lexer::new(escape).process(word, env)?.words)
}

impl Lexer {
    /// A lexer that takes quotes and escapes away.
    pub fn new(escape: char) -> Lexer {
        Lexer {
            escape,
            keep_quotes: false,
            keep_escapes: false,
            ignore_quotes: false,
            keep_unset: false,
        }
    }

    /// Expands `word` and says which variables it used.
    ///
    /// # Errors
    /// As [`process_word`].
    pub fn process(&self, word: &str, env: &dyn Environment) -> Result<ProcessWithMatches, ExpansionProblem> {
        let mut run = Run {
            lexer: self,
            input: word.chars().collect(),
            at: 0,
            env,
            matched: BTreeSet::new(),
            unmatched: BTreeSet::new(),
            depth: 0,
            produced: 0,
        };
        let (text, words) = run.until(None, self.keep_escapes)?;
        Ok(ProcessWithMatches {
            text,
            words,
            matched: run.matched,
            unmatched: run.unmatched,
        })
    }
}

/// Collects text both whole and split at unquoted spaces.
#[derive(Default)]
struct Words {
    done: Vec<String>,
    word: String,
}

impl Words {
    fn splittable(&mut self, c: char) {
        if !c.is_whitespace() {
            self.word.push(c);
        } else if !self.word.is_empty() {
            self.done.push(std::mem::take(&mut self.word));
        }
    }

    fn finish(mut self) -> Vec<String> {
        if !self.word.is_empty() {
            self.done.push(self.word);
        }
        self.done
    }
}

struct Run<'a> {
    lexer: &'a Lexer,
    input: Vec<char>,
    at: usize,
    env: &'a dyn Environment,
    matched: BTreeSet<String>,
    unmatched: BTreeSet<String>,
    depth: usize,
    produced: usize,
}

type Step<T> = Result<T, ExpansionProblem>;

impl Run<'_> {
    fn peek(&self) -> Option<char> {
        self.input.get(self.at).copied()
    }

    fn next(&mut self) -> Option<char> {
        let c = self.peek();
        self.at += usize::from(c.is_some());
        c
    }

    // Nested substitutions copy their text once per level, so all copies count, not only the result.
    fn charge(&mut self, bytes: usize) -> Step<()> {
        self.produced = self.produced.saturating_add(bytes);
        if self.produced > WORD_LIMIT {
            return Err(ExpansionProblem::TooLarge { limit: WORD_LIMIT });
        }
        Ok(())
    }

    /// Everything up to `stop` (which is consumed), or to the end where there is none.
    fn until(&mut self, stop: Option<char>, keep_escapes: bool) -> Step<(String, Vec<String>)> {
        let mut text = String::new();
        let mut words = Words::default();
        while let Some(c) = self.peek() {
            if Some(c) == stop {
                self.at += 1;
                return Ok((text, words.finish()));
            }
            let special = match c {
                '$' => Some(self.dollar()?),
                '<' => Some(self.heredoc_marker()),
                '\'' if !self.lexer.ignore_quotes => Some(self.single_quoted()?),
                '"' if !self.lexer.ignore_quotes => Some(self.double_quoted(keep_escapes)?),
                _ => None,
            };
            if let Some(part) = special {
                self.charge(part.len())?;
                text.push_str(&part);
                match c {
                    '$' => part.chars().for_each(|c| words.splittable(c)),
                    _ => words.word.push_str(&part),
                }
                continue;
            }
            self.at += 1;
            self.charge(c.len_utf8())?;
            if c != self.lexer.escape {
                words.splittable(c);
                text.push(c);
                continue;
            }
            if keep_escapes {
                words.word.push(c);
                text.push(c);
            }
            // An escape at the very end says nothing.
            if let Some(escaped) = self.next() {
                words.word.push(escaped);
                text.push(escaped);
            }
        }
        match stop {
            None => Ok((text, words.finish())),
            Some('/') => Err(ExpansionProblem::MissingSlash),
            Some(_) => Err(ExpansionProblem::MissingBrace),
        }
    }

    // `<<` keeps the spaces after it, so that `<< EOF` stays one word.
    fn heredoc_marker(&mut self) -> String {
        self.at += 1;
        if self.peek() != Some('<') {
            return "<".to_owned();
        }
        self.at += 1;
        let mut marker = "<<".to_owned();
        while let Some(c @ ('\t' | '\r' | ' ')) = self.peek() {
            marker.push(c);
            self.at += 1;
        }
        marker
    }

    fn quote(&self) -> &'static str {
        // Only asked for right at a quote.
        match (self.lexer.keep_quotes, self.peek()) {
            (true, Some('"')) => "\"",
            (true, _) => "'",
            (false, _) => "",
        }
    }

    fn single_quoted(&mut self) -> Step<String> {
        let quote = self.quote();
        let mut out = quote.to_owned();
        self.at += 1;
        loop {
            match self.next() {
                None => return Err(ExpansionProblem::SingleQuote),
                Some('\'') => return Ok(out + quote),
                Some(c) => out.push(c),
            }
        }
    }

    // Inside, the escape character stands for itself unless `"`, `$` or itself follows
    // (POSIX 2.2.3, but for the backquote, which means nothing here).
    fn double_quoted(&mut self, keep_escapes: bool) -> Step<String> {
        let quote = self.quote();
        let mut out = quote.to_owned();
        self.at += 1;
        loop {
            match self.peek() {
                None => return Err(ExpansionProblem::DoubleQuote),
                Some('"') => {
                    self.at += 1;
                    return Ok(out + quote);
                }
                Some('$') => {
                    let value = self.dollar()?;
                    self.charge(value.len())?;
                    out.push_str(&value);
                }
                Some(c) => {
                    self.at += 1;
                    let mut c = c;
                    if c == self.lexer.escape {
                        if keep_escapes {
                            out.push(c);
                        }
                        match self.peek() {
                            None => continue,
                            Some(escaped) if escaped == '"' || escaped == '$' || escaped == c => {
                                c = escaped;
                                self.at += 1;
                            }
                            Some(_) => {}
                        }
                    }
                    out.push(c);
                }
            }
        }
    }

    fn lookup(&mut self, name: &str) -> Option<String> {
        let value = self.env.get(name).map(str::to_owned);
        let set = if value.is_some() {
            &mut self.matched
        } else {
            &mut self.unmatched
        };
        set.insert(name.to_owned());
        value
    }

    fn dollar(&mut self) -> Step<String> {
        self.at += 1;
        if self.peek() == Some('{') {
            self.at += 1;
            self.depth += 1;
            if self.depth > DEPTH_LIMIT {
                return Err(ExpansionProblem::TooDeep);
            }
            let value = self.braced();
            self.depth -= 1;
            return value;
        }
        let name = self.name();
        if name.is_empty() {
            return Ok("$".to_owned());
        }
        match self.lookup(&name) {
            None if self.lexer.keep_unset => Ok(format!("${name}")),
            value => Ok(value.unwrap_or_default()),
        }
    }

    fn braced(&mut self) -> Step<String> {
        match self.peek() {
            None => return Err(ExpansionProblem::MissingBrace),
            Some('{' | '}' | ':') => return Err(ExpansionProblem::BadSubstitution),
            Some(_) => {}
        }
        let name = self.name();
        match self.next() {
            None => Err(ExpansionProblem::MissingBrace),
            Some('}') => match self.lookup(&name) {
                None if self.lexer.keep_unset => Ok(format!("${{{name}}}")),
                value => Ok(value.unwrap_or_default()),
            },
            Some('/') => self.replacement(&name),
            Some(':') => match self.next() {
                None => Err(ExpansionProblem::MissingBrace),
                Some(operator @ ('-' | '+' | '?')) => self.default(&name, operator, true),
                Some(c) => Err(ExpansionProblem::UnsupportedModifier {
                    modifier: format!(":{c}"),
                }),
            },
            Some(operator @ ('-' | '+' | '?')) => self.default(&name, operator, false),
            Some(operator @ ('#' | '%')) => self.trimmed(&name, operator),
            Some(c) => Err(ExpansionProblem::UnsupportedModifier {
                modifier: c.to_string(),
            }),
        }
    }

    /// `${name-word}` and its like; with a colon, an empty value counts as none.
    fn default(&mut self, name: &str, operator: char, colon: bool) -> Step<String> {
        let (word, _) = self.until(Some('}'), false)?;
        let value = self.lookup(name);
        if value.is_none() && self.lexer.keep_unset {
            let colon = if colon { ":" } else { "" };
            return Ok(format!("${{{name}{colon}{operator}{word}}}"));
        }
        let is_set = value.is_some();
        let usable = value.filter(|v| !(colon && v.is_empty()));
        match (operator, usable) {
            ('-', value) => Ok(value.unwrap_or(word)),
            ('+', Some(_)) => Ok(word),
            ('+', None) => Ok(String::new()),
            (_, Some(value)) => Ok(value),
            (_, None) => {
                let message = match (word.is_empty(), is_set) {
                    (false, _) => word,
                    (true, false) => "it must be set".to_owned(),
                    (true, true) => "it must not be empty".to_owned(),
                };
                Err(ExpansionProblem::Required {
                    name: name.to_owned(),
                    message,
                })
            }
        }
    }

    /// `${name#pattern}`, `${name%pattern}`; doubled, the longest match goes instead of the shortest.
    fn trimmed(&mut self, name: &str, operator: char) -> Step<String> {
        let (word, _) = self.until(Some('}'), true)?;
        let Some(value) = self.lookup(name) else {
            return Ok(match self.lexer.keep_unset {
                true => format!("${{{name}{operator}{word}}}"),
                false => String::new(),
            });
        };
        let longest = word.strip_prefix(operator);
        let pattern = Pattern::new(longest.unwrap_or(&word), longest.is_some())?;
        match operator {
            '#' => pattern.without_prefix(&value),
            _ => pattern.without_suffix(&value),
        }
    }

    /// `${name/pattern/replacement}`; `//` replaces every match.
    fn replacement(&mut self, name: &str) -> Step<String> {
        let all = self.peek() == Some('/');
        self.at += usize::from(all);
        let (pattern, _) = self.until(Some('/'), true)?;
        let (replacement, _) = self.until(Some('}'), true)?;
        let Some(value) = self.lookup(name) else {
            return Ok(match self.lexer.keep_unset {
                true => format!("${{{name}/{pattern}/{replacement}}}"),
                false => String::new(),
            });
        };
        Pattern::new(&pattern, true)?.replaced(&value, &replacement, all)
    }

    /// A name; a number; or one of the shell's special parameters, which are never set.
    fn name(&mut self) -> String {
        let start = self.at;
        match self.peek() {
            Some(c) if c.is_numeric() => {
                while self.peek().is_some_and(char::is_numeric) {
                    self.at += 1;
                }
            }
            Some('@' | '*' | '#' | '?' | '-' | '$' | '!') => self.at += 1,
            _ => {
                while self.peek().is_some_and(|c| c.is_alphanumeric() || c == '_') {
                    self.at += 1;
                }
            }
        }
        self.input[start..self.at].iter().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn env() -> BTreeMap<String, String> {
        [("A", "one"), ("B", "x  y"), ("E", ""), ("P", "/usr/local/lib")]
            .map(|(k, v)| (k.to_owned(), v.to_owned()))
            .into()
    }

    fn word(text: &str) -> Result<String, ExpansionProblem> {
        process_word(text, '\\', &env())
    }

    #[test]
    fn a_required_variable_fails_with_its_own_message() {
        let failed = word("${FOO:?msg}").unwrap_err();
        assert_eq!(failed.to_string(), "FOO: msg");
        assert_eq!(word("${A:?msg}").as_deref(), Ok("one"));
        assert!(word("${E?}").is_ok() && word("${E:?}").is_err());
    }

    #[test]
    fn a_default_after_text_keeps_the_text_when_split() {
        let words = process_words("a${FOO:-b c}d e", '\\', &env());
        assert_eq!(words.as_deref(), Ok(&["ab", "cd", "e"].map(str::to_owned)[..]));
    }

    #[test]
    fn the_display_form_keeps_quotes_and_unset_variables() {
        let lexer = Lexer {
            keep_quotes: true,
            keep_unset: true,
            ..Lexer::new('\\')
        };
        let shown = lexer.process(r#"RUN echo "$A" '$A' ${NO:-x} $NO"#, &env());
        assert_eq!(
            shown.map(|s| s.text).as_deref(),
            Ok(r#"RUN echo "one" '$A' ${NO:-x} $NO"#)
        );
    }

    #[test]
    fn nesting_and_growth_are_bounded() {
        let deep = "${X:-".repeat(1000) + &"}".repeat(1000);
        assert_eq!(word(&deep), Err(ExpansionProblem::TooDeep));
        let env: BTreeMap<_, _> = [("X".to_owned(), "x".repeat(1000))].into();
        let wide = "$X ".repeat(2000);
        assert_eq!(
            process_word(&wide, '\\', &env),
            Err(ExpansionProblem::TooLarge { limit: WORD_LIMIT })
        );
    }

    #[test]
    fn the_other_escape_character_leaves_backslashes_alone() {
        assert_eq!(process_word(r"c:\$A`$A", '`', &env()).as_deref(), Ok(r"c:\one$A"));
    }
}

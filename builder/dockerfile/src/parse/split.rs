//! One instruction's line into keyword, flags and arguments, each instruction by its own grammar.

use crate::ast::{Args, Node, Pair};
use crate::error::{Error, Problem};
use crate::span::Span;

// The language's own idea of a space between words; a newline cannot be in a line.
const SPACE: [char; 5] = ['\t', '\x0b', '\x0c', '\r', ' '];

/// Splits a line (continuations joined). Unknown keywords are left for later.
pub(crate) fn statement(line: &str, escape: char, span: Span) -> Result<Node, Error> {
    let (keyword, rest) = match line.trim().split_once(SPACE) {
        Some((keyword, rest)) => (keyword, rest.trim_start_matches(SPACE)),
        None => (line.trim(), ""),
    };
    let (flags, rest) = flags(rest, escape);
    let rest = rest.trim();
    let (args, json) = arguments(keyword, rest, escape, &span)?;
    Ok(Node {
        keyword: keyword.to_owned(),
        flags,
        args,
        json,
        heredocs: Vec::new(),
        original: line.to_owned(),
        span,
        comments: Vec::new(),
    })
}

fn arguments(keyword: &str, rest: &str, escape: char, span: &Span) -> Result<(Args, bool), Error> {
    let fail = |problem| Error::new(span, problem);
    let words = |words: Vec<String>| {
        if words.is_empty() {
            Args::None
        } else {
            Args::Words(words)
        }
    };
    let whole = |rest: &str| words((!rest.is_empty()).then(|| rest.to_owned()).into_iter().collect());
    let keyword = keyword.to_ascii_uppercase();
    let json = |rest: &str| match json_strings(rest) {
        Json::Strings(strings) => Ok(Some(strings)),
        Json::Other => Err(fail(Problem::JsonNotStrings {
            instruction: keyword.clone(),
        })),
        Json::None => Ok(None),
    };
    Ok(match keyword.as_str() {
        "ADD" | "COPY" | "VOLUME" => match json(rest)? {
            Some(strings) => (words(strings), true),
            None => (words(at_spaces(rest)), false),
        },
        "CMD" | "ENTRYPOINT" | "RUN" | "SHELL" => match json(rest)? {
            Some(strings) => (words(strings), true),
            None => (whole(rest), false),
        },
        "EXPOSE" | "FROM" => (words(at_spaces(rest)), false),
        "MAINTAINER" | "STOPSIGNAL" | "USER" | "WORKDIR" => (whole(rest), false),
        "ARG" => (words(quoted_words(rest, escape)), false),
        "ENV" => (pairs("ENV", rest, escape).map_err(fail)?, false),
        "LABEL" => (pairs("LABEL", rest, escape).map_err(fail)?, false),
        "HEALTHCHECK" => {
            let (kind, command) = match rest.split_once(char::is_whitespace) {
                Some((kind, command)) => (kind, command.trim_start()),
                None => (rest, ""),
            };
            let found = if command.is_empty() { None } else { json(command)? };
            let is_json = found.is_some();
            let command = found.unwrap_or_else(|| {
                (!command.is_empty())
                    .then(|| command.to_owned())
                    .into_iter()
                    .collect()
            });
            let kind = (!kind.is_empty()).then(|| kind.to_owned());
            (words(kind.into_iter().chain(command).collect()), is_json)
        }
        "ONBUILD" if rest.is_empty() => (Args::None, false),
        "ONBUILD" => {
            // A trigger cannot be a trigger again: what it says is not looked at, and the recursion ends here.
            let nested = rest
                .split(SPACE)
                .next()
                .is_some_and(|k| k.eq_ignore_ascii_case("ONBUILD"));
            let trigger = match nested {
                true => Node {
                    keyword: rest[.."ONBUILD".len()].to_owned(),
                    flags: Vec::new(),
                    args: words(at_spaces(rest).split_off(1)),
                    json: false,
                    heredocs: Vec::new(),
                    original: rest.to_owned(),
                    span: span.clone(),
                    comments: Vec::new(),
                },
                false => statement(rest, escape, span.clone())?,
            };
            let json = trigger.json;
            (Args::Trigger(Box::new(trigger)), json)
        }
        _ => (Args::Words(vec![String::new()]), false),
    })
}

fn at_spaces(rest: &str) -> Vec<String> {
    rest.split(SPACE)
        .filter(|w| !w.is_empty())
        .map(str::to_owned)
        .collect()
}

enum Json {
    Strings(Vec<String>),
    /// An array, but not of strings only.
    Other,
    /// No JSON array at all: the text means itself.
    None,
}

fn json_strings(rest: &str) -> Json {
    if !rest.trim_start().starts_with('[') {
        return Json::None;
    }
    match serde_json::from_str::<Vec<serde_json::Value>>(rest) {
        Err(_) => Json::None,
        Ok(values) => {
            let strings: Option<Vec<String>> = values
                .into_iter()
                .map(|v| match v {
                    serde_json::Value::String(s) => Some(s),
                    _ => None,
                })
                .collect();
            strings.map_or(Json::Other, Json::Strings)
        }
    }
}

/// The words at the start that begin with `--`, quotes and escapes taken away, and the rest of the line.
/// A bare `--` ends them and is dropped.
fn flags(line: &str, escape: char) -> (Vec<String>, &str) {
    let mut flags = Vec::new();
    let mut rest = line.trim_start();
    while rest.starts_with("--") {
        let mut word = String::new();
        let mut quote = None;
        let mut chars = rest.char_indices();
        let mut end = rest.len();
        while let Some((at, c)) = chars.next() {
            match quote {
                None if c.is_whitespace() => {
                    end = at;
                    break;
                }
                None if c == '\'' || c == '"' => quote = Some(c),
                Some(open) if c == open => quote = None,
                _ if c == escape => word.extend(chars.next().map(|(_, c)| c)),
                _ => word.push(c),
            }
        }
        rest = rest[end..].trim_start();
        if word == "--" {
            break;
        }
        flags.push(word);
    }
    (flags, rest)
}

/// Words between spaces that are neither quoted nor escaped. Quotes and escapes stay: they are read when
/// the word is expanded.
fn quoted_words(line: &str, escape: char) -> Vec<String> {
    let mut words = Vec::new();
    let mut word = String::new();
    let mut quote = None;
    let mut chars = line.chars().peekable();
    while let Some(c) = chars.next() {
        if quote.is_none() && c.is_whitespace() {
            if !word.is_empty() {
                words.push(std::mem::take(&mut word));
            }
            continue;
        }
        match quote {
            None if c == '\'' || c == '"' => quote = Some(c),
            Some(open) if c == open => quote = None,
            _ => {}
        }
        // In single quotes nothing escapes; elsewhere an escape takes the next character with it,
        // and at the end of the line it is dropped.
        if c == escape && quote != Some('\'') {
            let Some(escaped) = chars.next() else { break };
            word.push(c);
            word.push(escaped);
            continue;
        }
        word.push(c);
    }
    if !word.is_empty() {
        words.push(word);
    }
    words
}

/// `name=value…`, or the legacy `name value` where the first word has no `=`.
fn pairs(instruction: &'static str, rest: &str, escape: char) -> Result<Args, Problem> {
    let words = quoted_words(rest, escape);
    let Some(first) = words.first() else {
        return Ok(Args::None);
    };
    if !first.contains('=') {
        let Some((key, value)) = rest.split_once(SPACE) else {
            return Err(Problem::PairWithoutValue {
                instruction,
                name: rest.to_owned(),
            });
        };
        let value = value.trim_start_matches(SPACE).to_owned();
        return Ok(Args::Pairs(vec![Pair {
            key: key.to_owned(),
            value,
            legacy: true,
        }]));
    }
    let pair = |word: &String| match word.split_once('=') {
        Some((key, value)) => Ok(Pair {
            key: key.to_owned(),
            value: value.to_owned(),
            legacy: false,
        }),
        None => Err(Problem::PairWithoutEquals {
            instruction,
            word: word.clone(),
        }),
    };
    Ok(Args::Pairs(words.iter().map(pair).collect::<Result<_, _>>()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_lose_their_quotes_and_end_at_two_dashes() {
        let (found, rest) = flags(r#"--a="x y" --b=c\ d -- --e f"#, '\\');
        assert_eq!(
            (found, rest),
            (vec!["--a=x y".to_owned(), "--b=c d".to_owned()], "--e f")
        );
        let (found, rest) = flags("-x --y", '\\');
        assert_eq!((found, rest), (vec![], "-x --y"));
    }

    #[test]
    fn words_keep_quotes_and_escapes() {
        let words = quoted_words(r#"a=b\ c 'd e'"f" ""  g\"#, '\\');
        assert_eq!(words, [r"a=b\ c", r#"'d e'"f""#, r#""""#, "g"]);
    }

    #[test]
    fn a_long_chain_of_triggers_does_not_recurse() {
        let line = "ONBUILD ".repeat(100_000);
        let node = statement(&line, '\\', Span::whole(&"D".into())).unwrap();
        assert!(matches!(node.args, Args::Trigger(_)));
    }
}

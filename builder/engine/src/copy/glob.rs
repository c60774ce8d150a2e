//! Wildcards of COPY and ADD, as Go's `filepath.Match` has them. Pure.
//!
//! `*` and `?` stop at `/`; `[a-z]`, `[^a-z]`; `\` takes the next character as it is.

/// Whether `path` has a wildcard that is not escaped.
pub fn has_wildcard(path: &str) -> bool {
    let mut chars = path.chars();
    while let Some(c) = chars.next() {
        match c {
            '*' | '?' | '[' => return true,
            '\\' => {
                chars.next();
            }
            _ => {}
        }
    }
    false
}

/// Splits a cleaned absolute path before its first component with a wildcard: ("/a/b", "c*/d").
/// The second part is empty when there is none.
pub fn split(path: &str) -> (String, String) {
    let parts: Vec<&str> = path.split('/').filter(|p| !p.is_empty() && *p != ".").collect();
    let first = parts.iter().position(|p| has_wildcard(p)).unwrap_or(parts.len());
    (format!("/{}", parts[..first].join("/")), parts[first..].join("/"))
}

/// A pattern that cannot be read: an unclosed class or a trailing backslash.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BadPattern;

/// Whether the whole of `name` matches `pattern`.
///
/// # Errors
/// When the pattern is malformed and matching got as far as the malformed part.
pub fn matches(pattern: &str, name: &str) -> Result<bool, BadPattern> {
    let pattern: Vec<char> = pattern.chars().collect();
    let name: Vec<char> = name.chars().collect();
    match_from(&pattern, &name)
}

fn match_from<'a>(mut pattern: &'a [char], mut name: &'a [char]) -> Result<bool, BadPattern> {
    // Where to go back to: the pattern after the last `*`, and the name it was tried on.
    let mut retry: Option<(&[char], &[char])> = None;
    loop {
        if let Some(rest) = pattern.strip_prefix(&['*']) {
            retry = Some((rest, name));
            pattern = rest;
            continue;
        }
        let step = if pattern.is_empty() {
            None
        } else {
            match_one(pattern, name)?
        };
        match step {
            Some((p, n)) => (pattern, name) = (p, n),
            None if pattern.is_empty() && name.is_empty() => return Ok(true),
            None => match retry {
                Some((p, [first, rest @ ..])) if *first != '/' => {
                    retry = Some((p, rest));
                    (pattern, name) = (p, rest);
                }
                _ => return Ok(false),
            },
        }
    }
}

type Rest<'a> = Option<(&'a [char], &'a [char])>;

/// Matches one element of the pattern against one character; `None` when it does not match.
fn match_one<'a>(pattern: &'a [char], name: &'a [char]) -> Result<Rest<'a>, BadPattern> {
    let first = name.first().copied();
    let after = name.get(1..).unwrap_or_default();
    Ok(match pattern {
        ['?', rest @ ..] => first.filter(|c| *c != '/').map(|_| (rest, after)),
        ['\\', c, rest @ ..] => (first == Some(*c)).then_some((rest, after)),
        ['\\'] => return Err(BadPattern),
        ['[', class @ ..] => {
            let (hit, rest) = match_class(class, first)?;
            hit.then_some((rest, after))
        }
        [c, rest @ ..] => (first == Some(*c)).then_some((rest, after)),
        [] => None,
    })
}

fn match_class(class: &[char], c: Option<char>) -> Result<(bool, &[char]), BadPattern> {
    let (negated, mut rest) = match class {
        ['^', rest @ ..] => (true, rest),
        _ => (false, class),
    };
    let mut hit = false;
    let mut first = true;
    loop {
        if let ([']', after @ ..], false) = (rest, first) {
            let hit = c.is_some_and(|c| c != '/') && hit != negated;
            return Ok((hit, after));
        }
        first = false;
        let (low, after) = class_char(rest)?;
        let (high, after) = match after {
            ['-', more @ ..] => class_char(more)?,
            _ => (low, after),
        };
        hit |= c.is_some_and(|c| low <= c && c <= high);
        rest = after;
    }
}

fn class_char(rest: &[char]) -> Result<(char, &[char]), BadPattern> {
    match rest {
        ['\\', c, after @ ..] => Ok((*c, after)),
        ['\\' | '-' | ']', ..] | [] => Err(BadPattern),
        [c, after @ ..] if !after.is_empty() => Ok((*c, after)),
        _ => Err(BadPattern),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wildcards_match_as_go_does() {
        for (pattern, name, want) in [
            ("abc", "abc", true),
            ("*", "abc", true),
            ("*c", "abc", true),
            ("a*", "a", true),
            ("a*", "ab/c", false),
            ("a*/b", "abc/b", true),
            ("a*/b", "a/c/b", false),
            ("a*b*c*d*e*/f", "axbxcxdxe/f", true),
            ("a*b*c*d*e*/f", "axbxcxdxexxx/f", true),
            ("a*b*c*d*e*/f", "axbxcxdxe/xxx/f", false),
            ("a*b?c*x", "abxbbxdbxebxczzx", true),
            ("a*b?c*x", "abxbbxdbxebxczzy", false),
            ("ab[c]", "abc", true),
            ("ab[b-d]", "abc", true),
            ("ab[e-g]", "abc", false),
            ("ab[^c]", "abc", false),
            ("ab[^e-g]", "abc", true),
            ("a\\*b", "a*b", true),
            ("a\\*b", "ab", false),
            ("a?b", "a☺b", true),
            ("a[^a]b", "a☺b", true),
            ("a???b", "a☺b", false),
            ("[a-ζ]*", "α", true),
            ("*[a-ζ]", "A", false),
            ("a?b", "a/b", false),
            ("a*b", "a/b", false),
            ("[\\]a]", "]", true),
            ("[\\-x]", "-", true),
            ("*x", "xxx", true),
        ] {
            assert_eq!(matches(pattern, name), Ok(want), "{pattern} on {name}");
        }
        for (pattern, name) in [
            ("[]a]", "]"),
            ("[-]", "-"),
            ("[x-]", "x"),
            ("[-x]", "x"),
            ("[a", "a"),
            ("a[", "ab"),
        ] {
            assert_eq!(matches(pattern, name), Err(BadPattern), "{pattern}");
        }
    }

    #[test]
    fn a_path_is_split_before_its_first_wildcard() {
        assert_eq!(split("/models/small/*"), ("/models/small".into(), "*".into()));
        assert_eq!(split("/a/b"), ("/a/b".into(), String::new()));
        assert_eq!(split("/*/x/y?"), ("/".into(), "*/x/y?".into()));
        assert_eq!(split("/a\\*b/c"), ("/a\\*b/c".into(), String::new()));
    }
}

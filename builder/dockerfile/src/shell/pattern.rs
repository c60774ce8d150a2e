//! Patterns of `${v#p}`, `${v%p}` and `${v/p/r}`: `*`, `?`, `\` and nothing else.

use crate::error::ExpansionProblem;

// Steps a search may take: a pattern with many stars on a long value would take minutes else.
const STEP_LIMIT: usize = 4_000_000;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Element {
    Literal(char),
    One,
    Many,
}

/// A pattern, matching as far as it can or as little as it can.
pub(super) struct Pattern {
    elements: Vec<Element>,
    greedy: bool,
}

impl Pattern {
    pub(super) fn new(text: &str, greedy: bool) -> Result<Pattern, ExpansionProblem> {
        let mut elements = Vec::new();
        let mut chars = text.chars();
        while let Some(c) = chars.next() {
            elements.push(match c {
                '*' => Element::Many,
                '?' => Element::One,
                // `}` and `/` end the parts of a substitution: escaped, they are just themselves.
                '\\' => match chars.next() {
                    Some(c @ ('*' | '?' | '\\' | '}' | '/')) => Element::Literal(c),
                    other => {
                        let escaped = other.map(String::from).unwrap_or_default();
                        return Err(ExpansionProblem::BadPattern { escaped });
                    }
                },
                c => Element::Literal(c),
            });
        }
        Ok(Pattern { elements, greedy })
    }

    pub(super) fn without_prefix(&self, value: &str) -> Result<String, ExpansionProblem> {
        let value: Vec<char> = value.chars().collect();
        let end = Search::new(self, &value).at(0)?.unwrap_or(0);
        Ok(value[end..].iter().collect())
    }

    // The shortest match at the end is the shortest at the start of everything turned round.
    pub(super) fn without_suffix(&self, value: &str) -> Result<String, ExpansionProblem> {
        let turned: Vec<char> = value.chars().rev().collect();
        let elements = self.elements.iter().rev().copied().collect();
        let pattern = Pattern {
            elements,
            greedy: self.greedy,
        };
        let end = Search::new(&pattern, &turned).at(0)?.unwrap_or(0);
        Ok(turned[end..].iter().rev().collect())
    }

    /// The first match replaced, or all of them; an empty match right after another one is none.
    pub(super) fn replaced(
        &self,
        value: &str,
        replacement: &str,
        all: bool,
    ) -> Result<String, ExpansionProblem> {
        let value: Vec<char> = value.chars().collect();
        let mut search = Search::new(self, &value);
        let mut out = String::new();
        let (mut copied, mut from, mut last_end) = (0, 0, 0);
        while from <= value.len() {
            let Some((start, end)) = search.from(from)? else {
                break;
            };
            out.extend(&value[copied..start]);
            if end > last_end || start == 0 {
                out.push_str(replacement);
            }
            if out.len() > super::WORD_LIMIT {
                return Err(ExpansionProblem::TooLarge {
                    limit: super::WORD_LIMIT,
                });
            }
            copied = end;
            last_end = end;
            if !all {
                break;
            }
            from = end.max(from + 1);
        }
        out.extend(value.get(copied..).unwrap_or_default());
        Ok(out)
    }
}

/// Backtracking over (element, position), the preferred way first. A star's states that failed once are
/// remembered, and they fail from wherever they are reached: so the work stays within pattern × value.
struct Search<'a> {
    pattern: &'a Pattern,
    value: &'a [char],
    stars: Vec<usize>,
    failed: Vec<u64>,
    steps: usize,
}

impl<'a> Search<'a> {
    fn new(pattern: &'a Pattern, value: &'a [char]) -> Search<'a> {
        let mut seen = 0;
        let stars = pattern
            .elements
            .iter()
            .map(|e| {
                seen += usize::from(*e == Element::Many);
                seen - usize::from(*e == Element::Many)
            })
            .collect();
        Search {
            pattern,
            value,
            stars,
            failed: Vec::new(),
            steps: 0,
        }
    }

    /// The leftmost match that starts at `start` or later.
    fn from(&mut self, start: usize) -> Result<Option<(usize, usize)>, ExpansionProblem> {
        for start in start..=self.value.len() {
            if let Some(end) = self.at(start)? {
                return Ok(Some((start, end)));
            }
        }
        Ok(None)
    }

    /// The end of the match that starts at `start`.
    fn at(&mut self, start: usize) -> Result<Option<usize>, ExpansionProblem> {
        let too_large = ExpansionProblem::TooLarge {
            limit: super::WORD_LIMIT,
        };
        let mut open = vec![(0, start)];
        // Those on the way to a match have not failed: they are forgotten again when there is one.
        let mut visited = Vec::new();
        while let Some((mut element, mut at)) = open.pop() {
            loop {
                self.steps += 1;
                if self.steps > STEP_LIMIT {
                    return Err(too_large);
                }
                let Some(kind) = self.pattern.elements.get(element) else {
                    visited.iter().for_each(|bit| self.clear(*bit));
                    return Ok(Some(at));
                };
                // Neither wildcard takes a newline.
                let here = self.value.get(at).copied();
                match kind {
                    Element::Literal(c) if here == Some(*c) => (element, at) = (element + 1, at + 1),
                    Element::One if here.is_some_and(|c| c != '\n') => {
                        (element, at) = (element + 1, at + 1);
                    }
                    Element::Many => {
                        let bit = self.stars[element] * (self.value.len() + 1) + at;
                        if bit > 8 * STEP_LIMIT {
                            return Err(too_large);
                        }
                        if !self.set(bit) {
                            break;
                        }
                        visited.push(bit);
                        let longer = here.is_some_and(|c| c != '\n').then_some((element, at + 1));
                        let shorter = (element + 1, at);
                        let (first, second) = match (self.pattern.greedy, longer) {
                            (true, Some(longer)) => (longer, Some(shorter)),
                            (_, longer) => (shorter, longer),
                        };
                        open.extend(second);
                        (element, at) = first;
                    }
                    _ => break,
                }
            }
        }
        Ok(None)
    }

    fn set(&mut self, bit: usize) -> bool {
        let word = bit / 64;
        if word >= self.failed.len() {
            self.failed.resize(word + 1, 0);
        }
        let was = self.failed[word] >> (bit % 64) & 1;
        self.failed[word] |= 1 << (bit % 64);
        was == 0
    }

    fn clear(&mut self, bit: usize) {
        self.failed[bit / 64] &= !(1 << (bit % 64));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prefix(value: &str, pattern: &str, greedy: bool) -> String {
        Pattern::new(pattern, greedy)
            .unwrap()
            .without_prefix(value)
            .unwrap()
    }

    fn suffix(value: &str, pattern: &str, greedy: bool) -> String {
        Pattern::new(pattern, greedy)
            .unwrap()
            .without_suffix(value)
            .unwrap()
    }

    fn replace(value: &str, pattern: &str, with: &str, all: bool) -> String {
        Pattern::new(pattern, true)
            .unwrap()
            .replaced(value, with, all)
            .unwrap()
    }

    #[test]
    fn prefixes_and_suffixes_go_short_or_long() {
        let path = "/usr/local/lib/x.tar.gz";
        assert_eq!(prefix(path, "*/", false), "usr/local/lib/x.tar.gz");
        assert_eq!(prefix(path, "*/", true), "x.tar.gz");
        assert_eq!(suffix(path, ".*", false), "/usr/local/lib/x.tar");
        assert_eq!(suffix(path, ".*", true), "/usr/local/lib/x");
        assert_eq!(suffix(path, "nothing", true), path);
    }

    #[test]
    fn replacements_follow_the_leftmost_longest_way() {
        assert_eq!(replace("a.b.c", ".", "-", false), "a-b.c");
        assert_eq!(replace("a.b.c", ".", "-", true), "a-b-c");
        assert_eq!(replace("aXbXc", "X*", "", false), "a");
        assert_eq!(replace("abc", "*", "z", true), "z");
        assert_eq!(replace("abc", "", "-", true), "-a-b-c-");
        assert_eq!(replace("äöü", "?", "x", true), "xxx");
    }

    #[test]
    fn a_hostile_pattern_ends() {
        let value = "a".repeat(20_000);
        let pattern = "*a".repeat(200) + "b";
        let result = Pattern::new(&pattern, true).unwrap().replaced(&value, "", true);
        assert!(matches!(result, Ok(_) | Err(ExpansionProblem::TooLarge { .. })));
    }

    #[test]
    fn unknown_escapes_are_refused() {
        assert!(Pattern::new(r"\#", true).is_err());
        assert!(Pattern::new("a\\", true).is_err());
        assert!(Pattern::new(r"\*\?\\\}\/", true).is_ok());
    }
}

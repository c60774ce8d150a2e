//! "Did you mean": the nearest of some names. Knows not what they name.

use crate::error::Suggestion;

// Further away than this, a name is another name and not a slip.
const DISTANCE_LIMIT: usize = 3;

/// The option nearest to `name`, if one is near.
pub(crate) fn nearest<'a>(name: &str, options: impl IntoIterator<Item = &'a str>) -> Suggestion {
    let mut best = None;
    let mut distance = DISTANCE_LIMIT;
    for option in options {
        if option == name {
            return Suggestion(None);
        }
        let found = levenshtein(name, option);
        if found < distance {
            (best, distance) = (Some(option.to_owned()), found);
        }
    }
    Suggestion(best)
}

/// As [`nearest`], but case doesn't count and the answer is in lower case where `name` is.
pub(crate) fn nearest_ignoring_case<'a>(
    name: &str,
    options: impl IntoIterator<Item = &'a str>,
) -> Suggestion {
    let options: Vec<String> = options.into_iter().map(str::to_lowercase).collect();
    let Suggestion(found) = nearest(&name.to_lowercase(), options.iter().map(String::as_str));
    let lower = name.to_lowercase() == name;
    Suggestion(found.map(|f| if lower { f } else { f.to_uppercase() }))
}

fn levenshtein(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let length = a.chars().count();
    if length.abs_diff(b.len()) >= DISTANCE_LIMIT {
        return DISTANCE_LIMIT;
    }
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, a) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, b) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(a != *b);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_slips_are_corrected() {
        assert_eq!(nearest("biuld", ["build", "test"]).0.as_deref(), Some("build"));
        assert_eq!(nearest("deploy", ["build", "test"]).0, None);
        assert_eq!(nearest("build", ["build", "built"]).0, None);
        assert_eq!(
            nearest_ignoring_case("form", ["FROM", "RUN"]).0.as_deref(),
            Some("from")
        );
        assert_eq!(
            nearest_ignoring_case("FORM", ["FROM", "RUN"]).0.as_deref(),
            Some("FROM")
        );
    }
}

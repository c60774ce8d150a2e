//! `skip=A,B;experimental=all;error=true`: which checks run and what they do.

use super::Rule;
use crate::error::Problem;
use crate::parse::directive;
use std::collections::BTreeSet;

/// What the check directive, or `--build-arg BUILDKIT_DOCKERFILE_CHECK`, says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Options {
    skip_all: bool,
    skip: BTreeSet<String>,
    experimental_all: bool,
    experimental: BTreeSet<String>,
    pub(super) error: bool,
}

impl Options {
    /// Reads options; an empty text has none.
    ///
    /// # Errors
    /// An option that does not exist, a value that cannot be.
    pub fn parse(text: &str) -> Result<Options, Problem> {
        let mut options = Options::default();
        for option in text.split(';').filter(|_| !text.trim().is_empty()) {
            let bad = || Problem::BadCheckOption {
                option: option.trim().to_owned(),
            };
            let (name, value) = option.split_once('=').ok_or_else(bad)?;
            let value = value.trim();
            let names = || value.split(',').map(|rule| rule.trim().to_owned()).collect();
            match (name.trim(), value) {
                ("skip", "all") => options.skip_all = true,
                ("skip", _) => options.skip = names(),
                ("experimental", "all") => options.experimental_all = true,
                ("experimental", _) => options.experimental = names(),
                ("error", "true" | "True" | "TRUE" | "t" | "T" | "1") => options.error = true,
                ("error", "false" | "False" | "FALSE" | "f" | "F" | "0") => options.error = false,
                _ => return Err(bad()),
            }
        }
        Ok(options)
    }

    /// The options in the comments above an instruction: the first `check=…`, if it can be read.
    pub(super) fn in_comments(comments: &[String]) -> Option<Options> {
        let checks = comments.iter().filter_map(|comment| directive(comment));
        let value = checks
            .into_iter()
            .find(|(name, _)| name == "check")
            .map(|(_, value)| value)?;
        Options::parse(value.split(' ').next().unwrap_or_default()).ok()
    }

    pub(super) fn merged(&self, other: &Options) -> Options {
        Options {
            skip_all: self.skip_all || other.skip_all,
            skip: self.skip.union(&other.skip).cloned().collect(),
            experimental_all: self.experimental_all || other.experimental_all,
            experimental: self.experimental.union(&other.experimental).cloned().collect(),
            error: self.error,
        }
    }

    pub(super) fn allows(&self, rule: Rule) -> bool {
        let name = rule.to_string();
        match rule.experimental() {
            true => self.experimental_all || self.experimental.contains(&name),
            false => !self.skip_all && !self.skip.contains(&name),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_choose_rules() {
        let options = Options::parse("skip=UndefinedVar, FromAsCasing;error=true").unwrap();
        assert!(!options.allows(Rule::UndefinedVar) && !options.allows(Rule::FromAsCasing));
        assert!(options.allows(Rule::WorkdirRelativePath) && options.error);
        assert!(!options.allows(Rule::InvalidDefinitionDescription));
        assert!(
            Options::parse("experimental=all")
                .unwrap()
                .allows(Rule::InvalidDefinitionDescription)
        );
        assert!(Options::parse("skip").is_err() && Options::parse("x=1").is_err());
        assert!(Options::parse("error=maybe").is_err());
        assert_eq!(Options::parse(" ").unwrap(), Options::default());
    }

    #[test]
    fn comments_have_options_of_their_own() {
        let comments = ["about it".to_owned(), "check=skip=all // because".to_owned()];
        assert!(
            !Options::in_comments(&comments)
                .unwrap()
                .allows(Rule::UndefinedVar)
        );
        assert_eq!(Options::in_comments(&comments[..1]), None);
    }
}

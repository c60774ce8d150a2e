//! Flags: which an instruction knows, and what they hold.

use crate::ast::Node;
use crate::error::Problem;
use crate::suggest::nearest;
use std::collections::BTreeMap;

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// `--link`, `--link=false`.
    Bool,
    /// `--from=x`.
    Text,
    /// `--mount=x`, any number of times.
    Texts,
}

/// The flags given to an instruction.
#[derive(Default)]
pub(super) struct Flags {
    bools: BTreeMap<&'static str, bool>,
    texts: BTreeMap<&'static str, Vec<String>>,
}

impl Flags {
    /// Reads the node's flags, `known` being all there are.
    pub(super) fn read(
        node: &Node,
        instruction: &'static str,
        known: &[(&'static str, Kind)],
    ) -> Result<Flags, Problem> {
        let mut flags = Flags::default();
        for written in &node.flags {
            let written = written.strip_prefix("--").unwrap_or(written);
            let (name, value) = match written.split_once('=') {
                Some((name, value)) => (name, Some(value)),
                None => (written, None),
            };
            let flag = || name.to_owned();
            let Some((name, kind)) = known.iter().find(|(k, _)| *k == name).copied() else {
                let suggestion = nearest(name, known.iter().map(|(k, _)| *k));
                return Err(Problem::UnknownFlag {
                    instruction,
                    flag: flag(),
                    suggestion,
                });
            };
            let duplicate = flags.bools.contains_key(name) || flags.texts.contains_key(name);
            if duplicate && kind != Kind::Texts {
                return Err(Problem::DuplicateFlag { flag: flag() });
            }
            match (kind, value) {
                (Kind::Bool, None) => {
                    flags.bools.insert(name, true);
                }
                (Kind::Bool, Some(value)) => {
                    let parsed = match value.to_ascii_lowercase().as_str() {
                        "" => return Err(Problem::FlagWithoutValue { flag: flag() }),
                        "true" => true,
                        "false" => false,
                        _ => {
                            return Err(Problem::FlagNotBoolean {
                                flag: flag(),
                                value: value.to_owned(),
                            });
                        }
                    };
                    flags.bools.insert(name, parsed);
                }
                (_, None) => return Err(Problem::FlagWithoutValue { flag: flag() }),
                (_, Some(value)) => flags.texts.entry(name).or_default().push(value.to_owned()),
            }
        }
        Ok(flags)
    }

    /// Refuses any flag.
    pub(super) fn none(node: &Node, instruction: &'static str) -> Result<(), Problem> {
        Flags::read(node, instruction, &[]).map(|_| ())
    }

    pub(super) fn bool(&self, name: &str) -> Option<bool> {
        self.bools.get(name).copied()
    }

    /// The value; an empty one counts as none.
    pub(super) fn text(&mut self, name: &str) -> Option<String> {
        self.texts(name).pop().filter(|v| !v.is_empty())
    }

    pub(super) fn texts(&mut self, name: &str) -> Vec<String> {
        self.texts.remove(name).unwrap_or_default()
    }
}

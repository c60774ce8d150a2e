//! Variables in the order in which they were last set.

use crate::shell;
use std::collections::BTreeMap;

/// ENV and ARG. A variable that is set again moves to the end.
#[derive(Debug, Clone, Default)]
pub(super) struct Environment {
    values: BTreeMap<String, (usize, String)>,
    next: usize,
    size: usize,
}

impl Environment {
    pub(super) fn set(&mut self, name: &str, value: &str) {
        let old = self.values.insert(name.to_owned(), (self.next, value.to_owned()));
        self.size += name.len() + value.len();
        self.size -= old.map_or(0, |(_, old)| name.len() + old.len());
        self.next += 1;
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.values.keys().map(String::as_str)
    }

    /// Names and values in order.
    pub(super) fn list(&self) -> Vec<(String, String)> {
        let mut entries: Vec<_> = self.values.iter().map(|(k, (at, v))| (at, k, v)).collect();
        entries.sort_unstable_by_key(|(at, ..)| **at);
        entries
            .into_iter()
            .map(|(_, k, v)| (k.clone(), v.clone()))
            .collect()
    }

    /// Bytes of all names and values, and what a list of them costs besides.
    pub(super) fn size(&self) -> usize {
        self.size + 48 * self.values.len()
    }
}

impl shell::Environment for Environment {
    fn get(&self, name: &str) -> Option<&str> {
        self.values.get(name).map(|(_, value)| value.as_str())
    }
}

/// The ARGs of a stage, each once, in the order of their first definition; without a value where none was given.
#[derive(Debug, Clone, Default)]
pub(super) struct Arguments {
    names: Vec<String>,
    values: BTreeMap<String, Option<String>>,
    size: usize,
}

impl Arguments {
    pub(super) fn define(&mut self, name: &str, value: Option<String>) {
        self.size += name.len() + value.as_ref().map_or(0, String::len) + 48;
        if self.values.insert(name.to_owned(), value).is_none() {
            self.names.push(name.to_owned());
        }
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.names.iter().map(String::as_str)
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.values.contains_key(name)
    }

    pub(super) fn size(&self) -> usize {
        self.size
    }

    /// `|2 A=1 B= `: how the history tells which arguments a command ran with. The environment's value
    /// wins over the argument's, as it does for the command.
    pub(super) fn prefix(&self, env: &Environment) -> String {
        if self.names.is_empty() {
            return String::new();
        }
        let mut out = format!("|{} ", self.names.len());
        for name in &self.names {
            let own = self.values.get(name).and_then(|v| v.as_deref());
            let value = shell::Environment::get(env, name).or(own).unwrap_or_default();
            out.push_str(&format!("{name}={value} "));
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_variable_set_again_moves_to_the_end() {
        let mut env = Environment::default();
        for (name, value) in [("A", "1"), ("B", "2"), ("A", "3")] {
            env.set(name, value);
        }
        assert_eq!(env.list(), [("B".into(), "2".into()), ("A".into(), "3".into())]);
        assert_eq!(env.size(), 4 + 2 * 48);
    }

    #[test]
    fn arguments_are_counted_once() {
        let mut env = Environment::default();
        let mut args = Arguments::default();
        assert_eq!(args.prefix(&env), "");
        args.define("foo", Some("bar".into()));
        args.define("unset", None);
        args.define("foo", Some("bar2".into()));
        env.set("foo", "bar2");
        assert_eq!(args.prefix(&env), "|2 foo=bar2 unset= ");
    }
}

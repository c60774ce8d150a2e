//! Checks that need no evaluation: cases, names, comments, defaults.

use super::{Linter, Rule};
use crate::ast::{Args, Ast, Node};
use crate::reference;
use crate::shell::{Environment, Lexer};
use std::collections::BTreeSet;

fn is(node: &Node, keyword: &str) -> bool {
    node.keyword.eq_ignore_ascii_case(keyword)
}

fn words(node: &Node) -> &[String] {
    match &node.args {
        Args::Words(words) => words,
        _ => &[],
    }
}

/// What single lines show.
pub(crate) fn statements(linter: &mut Linter, ast: &Ast) {
    for line in &ast.empty_continuations {
        let span = crate::Span::new(&ast.file, *line, *line);
        linter.warn(Rule::NoEmptyContinuation, &span, &[], || {
            "an empty line continues the instruction".into()
        });
    }
    for node in &ast.nodes {
        let mut warn = |rule, message: String| linter.warn(rule, &node.span, &node.comments, || message);
        if is(node, "MAINTAINER") {
            warn(
                Rule::MaintainerDeprecated,
                "MAINTAINER is deprecated; a label says the same".into(),
            );
        }
        if is(node, "ARG") {
            let names: Vec<&str> = words(node).iter().filter_map(|w| w.split('=').next()).collect();
            description(&mut warn, node, "ARG", &names);
        }
        if !is(node, "FROM") {
            continue;
        }
        let [_, keyword, name] = words(node) else { continue };
        if *name != name.to_lowercase() {
            warn(
                Rule::StageNameCasing,
                format!("the stage name '{name}' is not in lower case"),
            );
        }
        let same = match node.keyword.as_str() {
            from if from == from.to_lowercase() => *keyword == keyword.to_lowercase(),
            from if from == from.to_uppercase() => *keyword == keyword.to_uppercase(),
            _ => true,
        };
        if !same {
            warn(
                Rule::FromAsCasing,
                format!("'{keyword}' is not in the case of '{}'", node.keyword),
            );
        }
        description(&mut warn, node, "FROM", &[&name.to_lowercase()]);
    }
}

fn description(warn: &mut impl FnMut(Rule, String), node: &Node, instruction: &str, names: &[&str]) {
    let Some(comment) = node.comments.last() else {
        return;
    };
    if names.is_empty() || names.contains(&comment.split(' ').next().unwrap_or_default()) {
        return;
    }
    let name = if names.len() == 1 { names[0] } else { "<arg_key>" };
    let message = format!("the comment above {instruction} is not of the form `# {name} <description>`");
    warn(Rule::InvalidDefinitionDescription, message);
}

/// Keywords in the case of most keywords.
pub(crate) fn casing(linter: &mut Linter, ast: &Ast) {
    let first = ast
        .nodes
        .iter()
        .position(|node| is(node, "FROM"))
        .unwrap_or(ast.nodes.len());
    let nodes = &ast.nodes[first..];
    let lower = nodes
        .iter()
        .filter(|n| n.keyword == n.keyword.to_lowercase())
        .count();
    let upper = nodes
        .iter()
        .filter(|n| n.keyword == n.keyword.to_uppercase())
        .count();
    for node in nodes {
        let (wanted, name) = match lower > upper {
            true => (node.keyword.to_lowercase(), "lowercase"),
            false => (node.keyword.to_uppercase(), "uppercase"),
        };
        if node.keyword != wanted {
            linter.warn(
                Rule::ConsistentInstructionCasing,
                &node.span,
                &node.comments,
                || format!("'{}' is not in the case of most keywords ({name})", node.keyword),
            );
        }
    }
}

/// Stages with names that others have, or that mean something else.
pub(crate) fn names(linter: &mut Linter, ast: &Ast) {
    let mut seen = BTreeSet::new();
    for node in ast.nodes.iter().filter(|node| is(node, "FROM")) {
        let [_, _, name] = words(node) else { continue };
        let name = name.to_lowercase();
        let mut warn = |rule, message: String| linter.warn(rule, &node.span, &node.comments, || message);
        if name == "context" || name == "scratch" {
            warn(
                Rule::ReservedStageName,
                format!("the stage name \"{name}\" is reserved"),
            );
        }
        if !seen.insert(name.clone()) {
            warn(
                Rule::DuplicateStageName,
                format!("two stages have the name \"{name}\""),
            );
        }
    }
}

/// Base images that are none when no build argument is given; `defaults` are the global ARGs then.
pub(crate) fn references(linter: &mut Linter, ast: &Ast, defaults: &dyn Environment) {
    for node in ast.nodes.iter().filter(|node| is(node, "FROM")) {
        let Some(base) = words(node).first() else { continue };
        let Ok(expanded) = Lexer::new(ast.directives.escape).process(base, defaults) else {
            return;
        };
        if reference::flaw(&expanded.text).is_some() {
            linter.warn(Rule::InvalidDefaultArgInFrom, &node.span, &node.comments, || {
                format!("with the defaults of its ARGs {base} names no image")
            });
        }
    }
}

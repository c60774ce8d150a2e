//! The stages of a file: grouping, names, bases and platforms after expansion, the target.

use super::args::{global, predefined};
use super::{Base, Plan, PlanInput, Planned, Stage};
use crate::ast::Ast;
use crate::error::{Error, Problem, Suggestion};
use crate::instruction::{ArgDefinition, From, Instruction, Statement, decode};
use crate::lint::{self, Linter, Options, Rule};
use crate::platform::Platform;
use crate::reference;
use crate::shell::{Lexer, ProcessWithMatches};
use crate::span::Span;
use crate::step::StageId;
use crate::suggest::nearest;
use std::collections::{BTreeMap, BTreeSet};

/// What all stages of a plan share.
#[derive(Debug, Clone)]
pub(crate) struct Outline {
    pub(crate) input: PlanInput,
    pub(crate) escape: char,
    pub(crate) whole: Span,
    /// Global ARGs and those every build has.
    pub(crate) globals: BTreeMap<String, String>,
    /// Names of global ARGs, whether they have a value or not.
    pub(crate) declared: BTreeSet<String>,
    pub(crate) epoch: Option<i64>,
    /// The stages that have a name, in ascending order.
    pub(crate) names: BTreeMap<String, Vec<StageId>>,
}

type Definitions<'a> = Vec<(&'a Statement, &'a [ArgDefinition])>;

pub(super) fn plan(ast: &Ast, input: &PlanInput) -> Result<Plan, Error> {
    let whole = Span::whole(&ast.file);
    let mut linter = linter(ast, input).map_err(|p| Error::new(&whole, p))?;
    let statements: Vec<Statement> = ast.nodes.iter().map(decode).collect::<Result<_, _>>()?;
    lint::statements(&mut linter, ast);
    let is_from = |s: &Statement| matches!(s.instruction, Instruction::From(_));
    let first = statements.iter().position(is_from).unwrap_or(statements.len());
    let (before, rest) = statements.split_at(first);
    let definitions = global_definitions(before)?;
    if rest.is_empty() {
        return Err(Error::new(&whole, Problem::NoStages));
    }
    lint::names(&mut linter, ast);
    lint::casing(&mut linter, ast);

    let last = rest.iter().rev().find_map(|s| match &s.instruction {
        Instruction::From(from) => Some(from.name.clone().unwrap_or_default()),
        _ => None,
    });
    let target = input.target.clone().or(last).unwrap_or_default();
    let escape = ast.directives.escape;
    let predefined = predefined(input, &target);
    if let Ok(defaults) = global(&predefined, &definitions, &BTreeMap::new(), escape) {
        lint::references(&mut linter, ast, &defaults);
    }
    let globals = global(&predefined, &definitions, &input.build_args, escape)?;
    let declared = definitions
        .iter()
        .flat_map(|(_, d)| d.iter().map(|d| d.name.clone()))
        .collect();
    let mut outline = Outline {
        input: input.clone(),
        escape,
        whole: whole.clone(),
        globals,
        declared,
        epoch: None,
        names: BTreeMap::new(),
    };
    outline.input.contexts = input.contexts.iter().map(|name| familiar(name)).collect();
    outline.read_epoch().map_err(|p| Error::new(&whole, p))?;

    let mut stages: Vec<Stage> = Vec::new();
    for statement in rest {
        if let Instruction::From(from) = &statement.instruction {
            let stage = outline.stage(&stages, statement, from, &mut linter)?;
            if let Some(name) = &from.name {
                outline.names.entry(name.clone()).or_default().push(stage.id);
            }
            stages.push(stage);
        } else if let Some(stage) = stages.last_mut() {
            let statement = statement.clone();
            stage.statements.push(Planned {
                statement,
                on_build: false,
                from: Vec::new(),
            });
        }
    }
    for stage in &mut stages {
        // A context in the place of a stage: what the stage would do is done already.
        let is_named = outline
            .names
            .get(&stage.name)
            .is_some_and(|ids| ids.contains(&stage.id));
        if is_named && outline.input.contexts.contains(&stage.name) {
            stage.statements.clear();
            stage.base = Base::Named(stage.name.clone());
        }
    }
    let target = outline.target(&stages)?;
    Ok(Plan {
        outline,
        stages,
        bases: BTreeMap::new(),
        target,
        needed: BTreeSet::new(),
        linter,
    })
}

fn linter(ast: &Ast, input: &PlanInput) -> Result<Linter, Problem> {
    let given = input
        .build_args
        .get("BUILDKIT_DOCKERFILE_CHECK")
        .map(String::as_str);
    let written = ast.directives.check.as_deref();
    Options::parse(given.or(written).unwrap_or_default()).map(Linter::new)
}

fn global_definitions(before: &[Statement]) -> Result<Definitions<'_>, Error> {
    let mut definitions = Definitions::new();
    for statement in before {
        match &statement.instruction {
            Instruction::Arg(found) => definitions.push((statement, found)),
            _ => return Err(Error::new(&statement.span, Problem::NoStage)),
        }
    }
    Ok(definitions)
}

/// An image's name without what Docker adds to it, which is how named contexts are compared.
pub(super) fn familiar(name: &str) -> String {
    let name = name.strip_prefix("docker.io/").unwrap_or(name);
    let name = name.strip_prefix("library/").unwrap_or(name);
    name.strip_suffix(":latest").unwrap_or(name).to_owned()
}

impl Outline {
    fn read_epoch(&mut self) -> Result<(), Problem> {
        const NAME: &str = "SOURCE_DATE_EPOCH";
        let given = self
            .input
            .build_args
            .get(NAME)
            .or(self.globals.get(NAME))
            .cloned();
        match given.as_deref() {
            None => {}
            // Empty is as good as not given.
            Some("") => {
                self.input.build_args.remove(NAME);
                self.globals.remove(NAME);
            }
            Some(value) => match value.parse() {
                Ok(epoch) => self.epoch = Some(epoch),
                Err(_) => {
                    return Err(Problem::BadEpoch {
                        value: value.to_owned(),
                    });
                }
            },
        }
        Ok(())
    }

    fn stage(
        &self,
        earlier: &[Stage],
        statement: &Statement,
        from: &From,
        linter: &mut Linter,
    ) -> Result<Stage, Error> {
        let span = &statement.span;
        let id = StageId(earlier.len());
        let expanded = self.expand(statement, &from.base, linter)?;
        if expanded.text.is_empty() {
            let suggestion = self.suggestion(&expanded);
            let problem = Problem::EmptyBase {
                expression: from.base.clone(),
                suggestion,
            };
            return Err(Error::new(span, problem));
        }
        let default = self
            .input
            .target_platform
            .as_ref()
            .unwrap_or(&self.input.build_platform);
        let asked = self.platform(statement, from, linter)?;
        let base = match self
            .names
            .get(&expanded.text.to_lowercase())
            .and_then(|ids| ids.last())
        {
            Some(earlier) => Base::Stage(*earlier),
            None if expanded.text == "scratch" => Base::Scratch,
            None => match (self.named(&expanded.text), reference::flaw(&expanded.text)) {
                (Some(context), _) => Base::Named(context),
                (None, Some(flaw)) => {
                    let name = expanded.text;
                    return Err(Error::new(span, Problem::BadImageName { name, flaw }));
                }
                (None, None) => Base::Image(expanded.text),
            },
        };
        let platform = match (&base, asked) {
            (Base::Stage(base), _) => earlier[base.0].platform.clone(),
            (Base::Scratch, _) | (_, None) => default.clone(),
            (_, Some(asked)) => asked,
        };
        Ok(Stage {
            id,
            name: from.name.clone().unwrap_or_else(|| format!("stage-{}", id.0)),
            base,
            platform,
            stages: BTreeSet::new(),
            sources: Vec::new(),
            span: span.clone(),
            original: statement.original.clone(),
            statements: Vec::new(),
            comments: statement.comments.clone(),
        })
    }

    /// The named context that stands in for an image.
    pub(super) fn named(&self, name: &str) -> Option<String> {
        let name = familiar(name);
        self.input.contexts.contains(&name).then_some(name)
    }

    fn expand(
        &self,
        statement: &Statement,
        word: &str,
        linter: &mut Linter,
    ) -> Result<ProcessWithMatches, Error> {
        let expanded = Lexer::new(self.escape)
            .process(word, &self.globals)
            .map_err(|reason| {
                Error::new(
                    &statement.span,
                    Problem::Expansion {
                        word: word.to_owned(),
                        reason,
                    },
                )
            })?;
        for name in expanded
            .unmatched
            .iter()
            .filter(|name| !self.declared.contains(*name))
        {
            linter.warn(
                Rule::UndefinedArgInFrom,
                &statement.span,
                &statement.comments,
                || {
                    format!(
                        "the ARG '{name}' of FROM is not declared{}",
                        nearest(name, self.known())
                    )
                },
            );
        }
        Ok(expanded)
    }

    fn known(&self) -> impl Iterator<Item = &str> {
        self.globals.keys().chain(&self.declared).map(String::as_str)
    }

    fn suggestion(&self, expanded: &ProcessWithMatches) -> Suggestion {
        let found = expanded.unmatched.iter().map(|name| nearest(name, self.known()));
        found.into_iter().find(|s| s.0.is_some()).unwrap_or_default()
    }

    fn platform(
        &self,
        statement: &Statement,
        from: &From,
        linter: &mut Linter,
    ) -> Result<Option<Platform>, Error> {
        let Some(written) = &from.platform else {
            return Ok(None);
        };
        let expanded = self.expand(statement, written, linter)?;
        let parsed = Platform::parse(&expanded.text, &self.input.build_platform);
        let mut warn = |rule, message: String| {
            linter.warn(rule, &statement.span, &statement.comments, || message);
        };
        let only_target = expanded.unmatched.is_empty()
            && expanded.matched.iter().eq(["TARGETPLATFORM"])
            && self.globals.get("TARGETPLATFORM") == Some(&expanded.text);
        if only_target {
            warn(
                Rule::RedundantTargetPlatform,
                format!("--platform={written} is what FROM does anyway"),
            );
        }
        if let (Some(platform), true) = (
            &parsed,
            expanded.matched.is_empty() && expanded.unmatched.is_empty(),
        ) {
            let name = from.name.as_deref().unwrap_or_default();
            if !name.contains(&platform.os) && !name.contains(&platform.architecture) {
                let message = format!("FROM --platform has the constant value \"{}\"", expanded.text);
                warn(Rule::FromPlatformFlagConstDisallowed, message);
            }
        }
        let suggestion = || self.suggestion(&expanded);
        match parsed {
            Some(platform) => Ok(Some(platform)),
            None if expanded.text.is_empty() => {
                let problem = Problem::EmptyPlatform {
                    expression: written.clone(),
                    suggestion: suggestion(),
                };
                Err(Error::new(&statement.span, problem))
            }
            None => {
                let problem = Problem::BadPlatform {
                    value: expanded.text.clone(),
                    suggestion: suggestion(),
                };
                Err(Error::new(&statement.span, problem))
            }
        }
    }

    fn target(&self, stages: &[Stage]) -> Result<StageId, Error> {
        let Some(target) = &self.input.target else {
            return Ok(StageId(stages.len() - 1));
        };
        if let Some(id) = self.names.get(&target.to_lowercase()).and_then(|ids| ids.last()) {
            return Ok(*id);
        }
        if let Some(stage) = target.parse().ok().and_then(|n: usize| stages.get(n)) {
            return Ok(stage.id);
        }
        let suggestion = nearest(target, self.names.keys().map(String::as_str));
        Err(Error::new(
            &self.whole,
            Problem::UnknownTarget {
                target: target.clone(),
                suggestion,
            },
        ))
    }
}

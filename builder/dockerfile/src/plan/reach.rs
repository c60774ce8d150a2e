//! Which stages a stage needs: its base, and what its instructions take files from. ONBUILD triggers
//! are instructions of the stage that gets them, and may need stages that nothing else does.

use super::{Base, Plan, Planned};
use crate::error::{Error, Problem};
use crate::instruction::{Instruction, decode};
use crate::parse::parse;
use crate::reference;
use crate::span::Span;
use crate::step::{Source, StageId};
use std::collections::HashSet;

impl Plan {
    /// Marks `wanted` as needed, with all they need.
    pub(super) fn reach(&mut self, mut wanted: Vec<StageId>) -> Result<(), Error> {
        while let Some(id) = wanted.pop() {
            if self.needed.insert(id)
                && let Base::Stage(base) = self.stages[id.0].base
            {
                let triggers = self.triggers_of(base);
                self.add_triggers(id, &triggers)?;
            }
            self.find_sources(id)?;
            let stages = &self.stages[id.0].stages;
            wanted.extend(stages.iter().filter(|stage| !self.needed.contains(stage)));
        }
        Ok(())
    }

    /// Refuses references that no stage could ever have, in stages that are not needed, too.
    pub(super) fn check_sources(&self) -> Result<(), Error> {
        for stage in &self.stages {
            for planned in &stage.statements {
                for name in names(&planned.statement.instruction).into_iter().flatten() {
                    let found = self.source(stage.id, name);
                    if let Err(problem @ (Problem::Circular { .. } | Problem::UnknownStageNumber { .. })) =
                        found
                    {
                        return Err(Error::new(&planned.statement.span, problem));
                    }
                }
            }
        }
        Ok(())
    }

    fn triggers_of(&self, stage: StageId) -> Vec<(String, Span)> {
        let statements = self.stages[stage.0]
            .statements
            .iter()
            .map(|planned| &planned.statement);
        let triggers = statements.filter_map(|statement| match &statement.instruction {
            Instruction::OnBuild(on_build) => Some((on_build.text.clone(), statement.span.clone())),
            _ => None,
        });
        triggers.collect()
    }

    /// Puts triggers before the instructions of a stage.
    pub(super) fn add_triggers(&mut self, id: StageId, triggers: &[(String, Span)]) -> Result<(), Error> {
        let mut statements = Vec::with_capacity(triggers.len());
        for (text, span) in triggers {
            let at = |problem| Error::new(span, problem);
            let not_one = || Problem::TriggerNotOne {
                trigger: text.clone(),
            };
            let within = |error: Error| at(Problem::in_trigger(text, error.problem));
            let ast = parse(text.as_bytes(), &span.file).map_err(within)?;
            let [node] = &ast.nodes[..] else {
                return Err(at(not_one()));
            };
            let mut statement = decode(node).map_err(within)?;
            statement.span = span.clone();
            match statement.instruction {
                Instruction::From(_) | Instruction::Maintainer(_) | Instruction::OnBuild(_) => {
                    return Err(at(not_one()));
                }
                _ => statements.push(Planned {
                    statement,
                    on_build: true,
                    from: Vec::new(),
                }),
            }
        }
        self.stages[id.0].statements.splice(0..0, statements);
        Ok(())
    }

    /// Looks up what the stage's instructions take files from.
    fn find_sources(&mut self, id: StageId) -> Result<(), Error> {
        let mut statements = std::mem::take(&mut self.stages[id.0].statements);
        let mut found = Ok(());
        for planned in &mut statements {
            let names: Vec<Option<&str>> = match &planned.statement.instruction {
                Instruction::Copy(copy) => vec![copy.from.as_deref()],
                Instruction::Run(run) => run.mounts.iter().map(|m| m.from.as_deref()).collect(),
                _ => continue,
            };
            let sources = names
                .into_iter()
                .map(|name| name.map(|n| self.source(id, n)).transpose());
            match sources.collect() {
                Ok(sources) => planned.from = sources,
                Err(problem) => found = found.and(Err(Error::new(&planned.statement.span, problem))),
            }
        }
        let stage = &mut self.stages[id.0];
        if let Base::Stage(base) = stage.base {
            stage.stages.insert(base);
        }
        let mut seen = HashSet::new();
        stage.sources.clear();
        for source in statements
            .iter()
            .flat_map(|planned| planned.from.iter().flatten())
        {
            match source {
                Source::Stage(other) => drop(stage.stages.insert(*other)),
                Source::Image(_) | Source::Named(_) if seen.insert(source) => {
                    stage.sources.push(source.clone());
                }
                _ => {}
            }
        }
        stage.statements = statements;
        found
    }

    /// What a name after `from=` means in a stage: the nearest stage above of that name or number, a named
    /// context, an image.
    fn source(&self, current: StageId, name: &str) -> Result<Source, Problem> {
        let stage_name = || self.stages[current.0].name.clone();
        let later = || Problem::LaterStage {
            from: name.to_owned(),
            stage: stage_name(),
        };
        if let Ok(index) = name.parse::<usize>() {
            return match index {
                _ if index < current.0 => Ok(Source::Stage(StageId(index))),
                _ if index == current.0 => Err(Problem::Circular { stage: stage_name() }),
                _ if index < self.stages.len() => Err(later()),
                _ => Err(Problem::UnknownStageNumber { index }),
            };
        }
        if let Some(ids) = self.outline.names.get(&name.to_lowercase()) {
            return match ids.partition_point(|id| *id < current) {
                0 if ids.contains(&current) => Err(Problem::Circular { stage: stage_name() }),
                0 => Err(later()),
                n => Ok(Source::Stage(ids[n - 1])),
            };
        }
        Ok(match self.outline.named(name) {
            Some(context) => Source::Named(context),
            None if name == "scratch" => Source::Scratch,
            None => match reference::flaw(name) {
                Some(flaw) => {
                    let name = name.to_owned();
                    return Err(Problem::BadImageName { name, flaw });
                }
                None => Source::Image(name.to_owned()),
            },
        })
    }
}

/// What an instruction takes files from, by name.
fn names(instruction: &Instruction) -> Vec<Option<&str>> {
    match instruction {
        Instruction::Copy(copy) => vec![copy.from.as_deref()],
        Instruction::Run(run) => run.mounts.iter().map(|m| m.from.as_deref()).collect(),
        _ => Vec::new(),
    }
}

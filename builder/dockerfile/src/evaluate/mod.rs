//! From needed stages to steps: one instruction after the other, each expanded with the variables that
//! those before it left. Knows what every instruction does to an image's config and history.
//!
//! All of it happens before anything runs, because nothing that runs changes what variables hold: so a
//! mistake in the last line is found before the first has cost an hour.

mod config;
mod copy;
mod environment;
mod expose;
mod run;
mod signal;

use crate::error::{Error, Problem, Suggestion};
use crate::image::{DEFAULT_PATH, HISTORY_COMMENT, History, ImageConfig};
use crate::instruction::Instruction;
use crate::lint::{Linter, Rule};
use crate::plan::args::PROXIES;
use crate::plan::{Base, BaseImage, Outline, Plan, Planned, Program, Stage, StageProgram};
use crate::platform::Platform;
use crate::shell::{Lexer, ProcessWithMatches};
use crate::span::Span;
use crate::step::{Action, StageId, Step};
use crate::suggest::nearest;
use environment::{Arguments, Environment};
use std::collections::{BTreeMap, BTreeSet};

// All that evaluation makes: every step has its own copy of the environment. Real builds take some
// hundred kilobytes; what takes more is an attempt to fill the memory.
const LIMIT: usize = 64 << 20;

/// Evaluates every needed stage.
pub(crate) fn program(plan: &Plan) -> Result<Program, Error> {
    let mut evaluator = Evaluator {
        outline: &plan.outline,
        proxies: crate::plan::args::proxies(&plan.outline.input.build_args),
        linter: plan.linter.clone(),
        used_args: BTreeSet::new(),
        charged: 0,
    };
    let mut states: BTreeMap<StageId, StageState> = BTreeMap::new();
    let mut stages = Vec::new();
    for stage in plan.stages() {
        let state = match &stage.base {
            Base::Stage(parent) => states.get(parent).map(StageState::child),
            Base::Scratch => Some(StageState::on(&BaseImage::empty(), &stage.platform)),
            Base::Image(_) | Base::Named(_) => plan
                .bases
                .get(&stage.id)
                .map(|base| StageState::on(base, &stage.platform)),
        };
        let unresolved = || Problem::BaseNotResolved {
            stage: stage.name.clone(),
        };
        let mut state = state.ok_or_else(|| Error::new(&stage.span, unresolved()))?;
        evaluator
            .charge(state.size())
            .map_err(|p| Error::new(&stage.span, p))?;
        let mut program = evaluator.stage(stage, &mut state)?;
        if plan.stages.len() == 1 {
            program.name.clear();
        }
        if stage.id == plan.target {
            program.config.labels.extend(plan.outline.input.labels.clone());
        }
        stages.push(program);
        states.insert(stage.id, state);
    }
    if let Some(warnings) = evaluator.linter.fatal() {
        return Err(Error::new(
            &plan.outline.whole,
            Problem::ChecksNotMet { warnings },
        ));
    }
    Ok(Program {
        stages,
        target: plan.target,
        epoch: plan.outline.epoch,
        unused_build_args: evaluator.unused(),
        warnings: evaluator.linter.warnings().to_vec(),
    })
}

/// What the instructions so far have made of a stage.
#[derive(Debug, Clone)]
struct StageState {
    /// ENV and ARG: what expansion and RUN see.
    env: Environment,
    /// The ARGs, for the history.
    args: Arguments,
    config: ImageConfig,
    author: Option<String>,
    platform: Platform,
    /// WORKDIR was used, here or in a stage below.
    workdir_set: bool,
    /// The last CMD, ENTRYPOINT and HEALTHCHECK of this stage.
    last: BTreeMap<&'static str, (Span, Vec<String>)>,
}

impl StageState {
    fn on(base: &BaseImage, platform: &Platform) -> StageState {
        let mut config = base.config.clone();
        config.on_build.clear();
        if config.env("PATH").is_none() && platform.os != "windows" {
            config.set_env("PATH", DEFAULT_PATH);
        }
        let mut state = StageState {
            env: Environment::default(),
            args: Arguments::default(),
            config,
            author: base.author.clone(),
            platform: platform.clone(),
            workdir_set: false,
            last: BTreeMap::new(),
        };
        state.enter();
        state
    }

    /// What a stage that starts from this one begins with: ARGs included, triggers not.
    fn child(&self) -> StageState {
        let mut state = self.clone();
        state.config.on_build.clear();
        state.last.clear();
        state.enter();
        state
    }

    // ENV of the base is set anew, over an ARG of the same name that the base's own instructions had seen.
    fn enter(&mut self) {
        for entry in &self.config.env {
            let (name, value) = entry.split_once('=').unwrap_or((entry, ""));
            self.env.set(name, value);
        }
        if !self.config.working_dir.is_empty() && !self.config.working_dir.starts_with('/') {
            self.config.working_dir = crate::path::join("/", &self.config.working_dir);
        }
    }

    fn cwd(&self) -> String {
        crate::path::join("/", &self.config.working_dir)
    }

    fn size(&self) -> usize {
        let labels: usize = self.config.labels.iter().map(|(k, v)| k.len() + v.len()).sum();
        let sets = self.config.exposed_ports.len() + self.config.volumes.len();
        2 * self.env.size() + self.args.size() + labels + 32 * sets
    }
}

struct Evaluator<'a> {
    outline: &'a Outline,
    proxies: Vec<(String, String)>,
    linter: Linter,
    used_args: BTreeSet<String>,
    charged: usize,
}

/// What one instruction has come to.
struct Outcome {
    action: Action,
    /// The history's text; None where there is no entry.
    created_by: Option<String>,
    /// The entry stands for a layer.
    has_layer: bool,
    /// What is said of the instruction beyond its own text.
    remark: Option<String>,
}

impl Outcome {
    fn config(created_by: String) -> Outcome {
        Outcome {
            action: Action::Config,
            created_by: Some(created_by),
            has_layer: false,
            remark: None,
        }
    }

    fn layer(action: Action, created_by: String) -> Outcome {
        Outcome {
            action,
            created_by: Some(created_by),
            has_layer: true,
            remark: None,
        }
    }
}

impl Evaluator<'_> {
    fn stage(&mut self, stage: &Stage, state: &mut StageState) -> Result<StageProgram, Error> {
        let loads_base = matches!(stage.base, Base::Image(_) | Base::Named(_));
        let mut total = usize::from(loads_base);
        let mut steps = Vec::with_capacity(stage.statements.len());
        for planned in &stage.statements {
            let statement = &planned.statement;
            let fail = |problem| match planned.on_build {
                true => Error::new(&statement.span, Problem::in_trigger(&statement.original, problem)),
                false => Error::new(&statement.span, problem),
            };
            let mut name = self.display(state, planned);
            let outcome = self.statement(state, planned).map_err(fail)?;
            let number = (!matches!(outcome.action, Action::Config)).then(|| {
                total += 1;
                total
            });
            if let Some(remark) = &outcome.remark {
                name.push_str(&format!(" ({remark})"));
            }
            let history = outcome.created_by.map(|created_by| History {
                created_by,
                comment: HISTORY_COMMENT.to_owned(),
                empty_layer: !outcome.has_layer,
            });
            self.charge(name.len() + history.as_ref().map_or(0, |h| h.created_by.len()))
                .map_err(fail)?;
            steps.push(Step {
                action: outcome.action,
                name,
                original: statement.original.clone(),
                span: statement.span.clone(),
                on_build: planned.on_build,
                number,
                history,
            });
        }
        Ok(StageProgram {
            id: stage.id,
            name: stage.name.clone(),
            base: stage.base.clone(),
            span: stage.span.clone(),
            original: stage.original.clone(),
            platform: state.platform.clone(),
            stages: stage.stages.clone(),
            sources: stage.sources.clone(),
            steps,
            total,
            config: state.config.clone(),
            author: state.author.clone(),
        })
    }

    fn statement(&mut self, state: &mut StageState, planned: &Planned) -> Result<Outcome, Problem> {
        match &planned.statement.instruction {
            Instruction::Run(run) => self.run(state, planned, run),
            Instruction::Copy(transfer) => self.copy(state, planned, transfer, false),
            Instruction::Add(transfer) => self.copy(state, planned, transfer, true),
            Instruction::Arg(definitions) => self.arg(state, planned, definitions),
            Instruction::Env(pairs) => self.env(state, planned, pairs),
            Instruction::Label(pairs) => self.label(state, planned, pairs),
            Instruction::Expose(ports) => self.expose(state, planned, ports),
            Instruction::Workdir(path) => self.workdir(state, planned, path),
            Instruction::User(user) => {
                state.config.user = self.expand(state, planned, user)?;
                Ok(Outcome::config(format!("USER {}", state.config.user)))
            }
            Instruction::Volume(volumes) => self.volume(state, planned, volumes),
            Instruction::StopSignal(signal) => {
                let signal = self.expand(state, planned, signal)?;
                signal::check(&signal)?;
                state.config.stop_signal = signal;
                Ok(Outcome::config(format!(
                    "STOPSIGNAL {}",
                    state.config.stop_signal
                )))
            }
            Instruction::Cmd(command) => Ok(self.cmd(state, planned, command)),
            Instruction::Entrypoint(command) => Ok(self.entrypoint(state, planned, command)),
            Instruction::Healthcheck(check) => Ok(self.healthcheck(state, planned, check)),
            Instruction::Shell(shell) => {
                state.config.shell.clone_from(shell);
                Ok(Outcome::config(format!("SHELL [{}]", shell.join(" "))))
            }
            Instruction::Maintainer(name) => {
                state.author = Some(name.clone());
                Ok(Outcome::config(format!("MAINTAINER {name}")))
            }
            Instruction::OnBuild(on_build) => {
                state.config.on_build.push(on_build.text.clone());
                Ok(Outcome {
                    created_by: None,
                    ..Outcome::config(String::new())
                })
            }
            // A stage's statements begin after its FROM, and a trigger cannot be one.
            Instruction::From(_) => Err(Problem::FromArguments),
        }
    }

    fn charge(&mut self, bytes: usize) -> Result<(), Problem> {
        self.charged = self.charged.saturating_add(bytes);
        if self.charged > LIMIT {
            Err(Problem::ExpansionTooLarge { limit: LIMIT })
        } else {
            Ok(())
        }
    }

    /// One word of an instruction, expanded.
    fn expand(&mut self, state: &StageState, planned: &Planned, word: &str) -> Result<String, Problem> {
        let lexer = Lexer::new(self.outline.escape);
        Ok(self.expand_with(lexer, state, planned, word)?.text)
    }

    fn expand_with(
        &mut self,
        lexer: Lexer,
        state: &StageState,
        planned: &Planned,
        word: &str,
    ) -> Result<ProcessWithMatches, Problem> {
        let expanded = lexer
            .process(word, &state.env)
            .map_err(|reason| Problem::Expansion {
                word: word.to_owned(),
                reason,
            })?;
        self.charge(expanded.text.len())?;
        // An ARG without a value is declared all the same.
        for name in expanded.unmatched.iter().filter(|name| !state.args.has(name)) {
            self.warn(planned, Rule::UndefinedVar, || {
                let known = state.env.names().chain(state.args.names());
                let near = nearest(name, known).0.map(|near| format!("${near}"));
                format!("${name} is not defined{}", Suggestion(near))
            });
        }
        Ok(expanded)
    }

    fn warn(&mut self, planned: &Planned, rule: Rule, message: impl FnOnce() -> String) {
        let statement = &planned.statement;
        self.linter
            .warn(rule, &statement.span, &statement.comments, message);
    }

    /// The instruction as it is shown: expanded as far as variables are set, quotes kept, the values of
    /// secrets hidden; unexpanded where it cannot be.
    fn display(&self, state: &StageState, planned: &Planned) -> String {
        let text = &planned.statement.original;
        let (keyword, rest) = text.split_once(char::is_whitespace).unwrap_or((text, ""));
        let text = format!("{} {rest}", keyword.to_uppercase()).trim_end().to_owned();
        if matches!(planned.statement.instruction, Instruction::OnBuild(_)) {
            return text;
        }
        let lexer = Lexer {
            keep_quotes: true,
            keep_unset: true,
            ..Lexer::new(self.outline.escape)
        };
        let masked = run::mask_secrets(state, planned);
        lexer.process(&text, &masked).map_or(text, |shown| shown.text)
    }

    fn unused(&self) -> Vec<String> {
        let known = |name: &str| {
            self.used_args.contains(name)
                || self.outline.declared.contains(name)
                || self.outline.globals.contains_key(name)
                || PROXIES.iter().any(|p| p.eq_ignore_ascii_case(name))
                || name == "SOURCE_DATE_EPOCH"
                || name.starts_with("BUILDKIT_")
        };
        self.outline
            .input
            .build_args
            .keys()
            .filter(|name| !known(name))
            .cloned()
            .collect()
    }
}

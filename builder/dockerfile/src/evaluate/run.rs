//! RUN: the command line, heredocs, mounts.

use super::environment::Environment;
use super::{Evaluator, Outcome, StageState};
use crate::ast::Heredoc;
use crate::error::Problem;
use crate::instruction::{Command, Instruction, MountKind, Run};
use crate::parse::marker;
use crate::path;
use crate::plan::Planned;
use crate::shell;
use crate::step::{Action, RunStep, Script};

// Where a heredoc that is a script of its own is put for the command to run.
const SCRIPTS: &str = "/dev/pipes";

impl Evaluator<'_> {
    pub(super) fn run(
        &mut self,
        state: &mut StageState,
        planned: &Planned,
        run: &Run,
    ) -> Result<Outcome, Problem> {
        let cwd = state.cwd();
        let mut mounts = Vec::with_capacity(run.mounts.len());
        for (at, mount) in run.mounts.iter().enumerate() {
            let from = planned.from.get(at).cloned().flatten();
            mounts.push(mount.expand(from, &cwd, &mut |word| self.expand(state, planned, word))?);
        }
        let (command, script, remark) = command(run);
        let argv = state.command_line(&command);
        if argv.iter().any(|arg| arg.contains('\0')) {
            return Err(Problem::Nul);
        }
        // The list of arguments is in the history once more.
        self.charge(state.env.size() + 2 * state.args.size() + argv.iter().map(String::len).sum::<usize>())?;
        let line = argv.join(" ");
        let created_by = format!("RUN {}{line} # buildkit", state.args.prefix(&state.env));
        let step = RunStep {
            argv,
            env: state.env.list(),
            proxy_env: self
                .proxies
                .iter()
                .filter(|(name, _)| !state.is_set(name))
                .cloned()
                .collect(),
            cwd,
            user: state.config.user.clone(),
            mounts,
            network: run.network,
            security: run.security,
            devices: run.devices.clone(),
            script,
        };
        Ok(Outcome {
            remark,
            ..Outcome::layer(Action::Run(Box::new(step)), created_by)
        })
    }
}

/// What the shell is given. A heredoc that is all of the command is the command itself, or, when it
/// begins with `#!`, a file that the command runs; in any other place it is for the shell to read.
fn command(run: &Run) -> (Command, Option<Script>, Option<String>) {
    let (Command::Shell(line), Some(first)) = (&run.command, run.heredocs.first()) else {
        return (run.command.clone(), None, None);
    };
    if marker(line).is_none() {
        let mut text = line.clone();
        for heredoc in &run.heredocs {
            text.push('\n');
            text.push_str(&heredoc.content);
            text.push_str(&heredoc.name);
        }
        return (Command::Shell(text), None, None);
    }
    let remark = Some(summary(first));
    let content = first.text();
    if !content.starts_with("#!") {
        return (Command::Shell(content), None, remark);
    }
    let path = path::join(SCRIPTS, path::base(&first.name));
    (
        Command::Shell(path.clone()),
        Some(Script { path, content }),
        remark,
    )
}

fn summary(heredoc: &Heredoc) -> String {
    let mut lines = heredoc.content.trim().lines();
    let first = lines.next().unwrap_or_default().trim_end();
    if lines.next().is_some() {
        format!("{first}...")
    } else {
        first.to_owned()
    }
}

/// The variables with those hidden that get a secret.
pub(super) fn mask_secrets<'a>(state: &'a StageState, planned: &Planned) -> Masked<'a> {
    let mut secret = Vec::new();
    if let Instruction::Run(run) = &planned.statement.instruction {
        for (at, mount) in run.mounts.iter().enumerate() {
            let from = planned.from.get(at).cloned().flatten();
            let mut expand = |word: &str| Ok(shell::process_word(word, '\\', &state.env).unwrap_or_default());
            // What cannot be expanded was refused before it comes to be shown.
            if let Ok(mount) = mount.expand(from, "/", &mut expand)
                && let MountKind::Secret { env: Some(name), .. } = mount.kind
            {
                secret.push(name);
            }
        }
    }
    Masked {
        env: &state.env,
        secret,
    }
}

pub(super) struct Masked<'a> {
    env: &'a Environment,
    secret: Vec<String>,
}

impl shell::Environment for Masked<'_> {
    fn get(&self, name: &str) -> Option<&str> {
        if self.secret.iter().any(|secret| secret == name) {
            return Some("****");
        }
        self.env.get(name)
    }
}

//! Instructions that write the image's config and nothing else, and WORKDIR.

use super::{Evaluator, Outcome, StageState};
use crate::ast::{Pair, go_quote};
use crate::error::Problem;
use crate::image::{Empty, Healthcheck};
use crate::instruction::health::format_duration;
use crate::instruction::{ArgDefinition, Command};
use crate::lint::Rule;
use crate::path;
use crate::plan::Planned;
use crate::shell::Environment as _;
use crate::step::{Action, WorkdirStep};

// ARGs that speak to the builder only.
const NOT_VARIABLES: [&str; 2] = ["BUILDKIT_SBOM_SCAN_CONTEXT", "BUILDKIT_SBOM_SCAN_STAGE"];

impl Evaluator<'_> {
    pub(super) fn env(
        &mut self,
        state: &mut StageState,
        planned: &Planned,
        pairs: &[Pair],
    ) -> Result<Outcome, Problem> {
        // All of them see the variables as they were before the instruction.
        let expanded = self.pairs(state, planned, "ENV", pairs)?;
        let mut created_by = "ENV".to_owned();
        for (name, value) in &expanded {
            self.secret(planned, "ENV", name);
            // Looking for the old value takes a walk over all there are.
            self.charge(4 * state.config.env.len())?;
            state.env.set(name, value);
            state.config.set_env(name, value);
            created_by.push_str(&format!(" {name}={value}"));
        }
        Ok(Outcome::config(created_by))
    }

    pub(super) fn label(
        &mut self,
        state: &mut StageState,
        planned: &Planned,
        pairs: &[Pair],
    ) -> Result<Outcome, Problem> {
        let expanded = self.pairs(state, planned, "LABEL", pairs)?;
        let texts = expanded.iter().map(|(name, value)| format!(" {name}={value}"));
        let created_by = format!("LABEL{}", texts.collect::<String>());
        state.config.labels.extend(expanded);
        Ok(Outcome::config(created_by))
    }

    fn pairs(
        &mut self,
        state: &StageState,
        planned: &Planned,
        instruction: &str,
        pairs: &[Pair],
    ) -> Result<Vec<(String, String)>, Problem> {
        let mut expanded = Vec::with_capacity(pairs.len());
        for pair in pairs {
            if pair.legacy {
                let message = || {
                    format!("\"{instruction} key value\" is the legacy form of \"{instruction} key=value\"")
                };
                self.warn(planned, Rule::LegacyKeyValueFormat, message);
            }
            let key = self.expand(state, planned, &pair.key)?;
            expanded.push((key, self.expand(state, planned, &pair.value)?));
        }
        Ok(expanded)
    }

    /// A build argument wins over the default, the default over a global ARG of the name.
    pub(super) fn arg(
        &mut self,
        state: &mut StageState,
        planned: &Planned,
        definitions: &[ArgDefinition],
    ) -> Result<Outcome, Problem> {
        let mut created_by = "ARG".to_owned();
        for ArgDefinition { name, default } in definitions {
            self.secret(planned, "ARG", name);
            self.used_args.insert(name.clone());
            let value = match (self.outline.input.build_args.get(name), default) {
                (Some(given), _) => Some(given.clone()),
                (None, Some(default)) => Some(self.expand(state, planned, default)?),
                (None, None) => self.outline.globals.get(name).cloned(),
            };
            created_by.push_str(&format!(" {name}"));
            if let Some(value) = &value {
                self.charge(value.len())?;
                created_by.push_str(&format!("={value}"));
                if !NOT_VARIABLES.contains(&name.as_str()) {
                    state.env.set(name, value);
                }
            }
            state.args.define(name, value);
        }
        Ok(Outcome::config(created_by))
    }

    fn secret(&mut self, planned: &Planned, instruction: &str, name: &str) {
        if names_a_secret(name) {
            let message =
                || format!("{instruction} keeps \"{name}\" readable in the image; mount a secret instead");
            self.warn(planned, Rule::SecretsUsedInArgOrEnv, message);
        }
    }

    pub(super) fn workdir(
        &mut self,
        state: &mut StageState,
        planned: &Planned,
        written: &str,
    ) -> Result<Outcome, Problem> {
        let expanded = self.expand(state, planned, written)?;
        if !std::mem::replace(&mut state.workdir_set, true) && !expanded.starts_with('/') {
            let message = || format!("\"{expanded}\" is relative to whatever the base image has");
            self.warn(planned, Rule::WorkdirRelativePath, message);
        }
        // An absolute path goes into the config as it is written: so it does in Docker's images.
        state.config.working_dir = match &state.config.working_dir {
            _ if expanded.starts_with('/') => expanded,
            current if expanded.is_empty() && !current.is_empty() => current.clone(),
            _ => path::join(&state.cwd(), &expanded),
        };
        let path = state.cwd();
        let created_by = format!("WORKDIR {}", state.config.working_dir);
        if path == "/" {
            return Ok(Outcome::config(created_by));
        }
        let user = state.config.user.clone();
        Ok(Outcome::layer(
            Action::Workdir(WorkdirStep { path, user }),
            created_by,
        ))
    }

    pub(super) fn volume(
        &mut self,
        state: &mut StageState,
        planned: &Planned,
        written: &[String],
    ) -> Result<Outcome, Problem> {
        let mut volumes = Vec::with_capacity(written.len());
        for volume in written {
            let volume = self.expand(state, planned, volume)?;
            if volume.is_empty() {
                return Err(Problem::EmptyVolume);
            }
            state.config.volumes.insert(volume.clone(), Empty {});
            volumes.push(volume);
        }
        Ok(Outcome::config(format!("VOLUME [{}]", volumes.join(" "))))
    }

    pub(super) fn cmd(&mut self, state: &mut StageState, planned: &Planned, command: &Command) -> Outcome {
        self.once(state, planned, "CMD");
        state.config.cmd = self.command_line(state, planned, "CMD", command);
        state.config.args_escaped = true;
        Outcome::config(format!("CMD {}", quoted(&state.config.cmd)))
    }

    pub(super) fn entrypoint(
        &mut self,
        state: &mut StageState,
        planned: &Planned,
        command: &Command,
    ) -> Outcome {
        self.once(state, planned, "ENTRYPOINT");
        state.config.entrypoint = self.command_line(state, planned, "ENTRYPOINT", command);
        // An inherited CMD was meant for the inherited entrypoint.
        if !state.last.contains_key("CMD") {
            state.config.cmd.clear();
        }
        Outcome::config(format!("ENTRYPOINT {}", quoted(&state.config.entrypoint)))
    }

    pub(super) fn healthcheck(
        &mut self,
        state: &mut StageState,
        planned: &Planned,
        check: &Healthcheck,
    ) -> Outcome {
        self.once(state, planned, "HEALTHCHECK");
        state.config.healthcheck = Some(check.clone());
        Outcome::config(format!(
            "HEALTHCHECK {{Test:[{}] Interval:{} Timeout:{} StartPeriod:{} StartInterval:{} Retries:{}}}",
            check.test.join(" "),
            format_duration(check.interval),
            format_duration(check.timeout),
            format_duration(check.start_period),
            format_duration(check.start_interval),
            check.retries,
        ))
    }

    fn once(&mut self, state: &mut StageState, planned: &Planned, instruction: &'static str) {
        let statement = &planned.statement;
        let this = (statement.span.clone(), statement.comments.clone());
        // The earlier one is the one that has no effect.
        if let Some((span, _)) = state.last.insert(instruction, this) {
            self.linter.warn(
                Rule::MultipleInstructionsDisallowed,
                &span,
                &statement.comments,
                || format!("of several {instruction} instructions only the last has an effect"),
            );
        }
    }

    fn command_line(
        &mut self,
        state: &StageState,
        planned: &Planned,
        instruction: &str,
        command: &Command,
    ) -> Vec<String> {
        if matches!(command, Command::Shell(_)) && state.config.shell.is_empty() {
            let message = || format!("{instruction} is in the shell form; signals don't reach the program");
            self.warn(planned, Rule::JSONArgsRecommended, message);
        }
        state.command_line(command)
    }
}

impl StageState {
    /// The program and its arguments: in the shell form, the shell's.
    pub(super) fn command_line(&self, command: &Command) -> Vec<String> {
        match command {
            Command::Exec(arguments) => arguments.clone(),
            Command::Shell(line) => {
                let mut shell = self.config.shell.clone();
                if shell.is_empty() {
                    shell = vec!["/bin/sh".to_owned(), "-c".to_owned()];
                }
                shell.push(line.clone());
                shell
            }
        }
    }

    /// Whether ENV or ARG has set a variable.
    pub(super) fn is_set(&self, name: &str) -> bool {
        self.env.get(name).is_some()
    }
}

/// A list of strings as Go's `%q` prints it.
fn quoted(list: &[String]) -> String {
    let quoted: Vec<String> = list.iter().map(|s| go_quote(s)).collect();
    format!("[{}]", quoted.join(" "))
}

/// Whether a name, split at `_`, has a word that stands for a secret and none that says it is none.
fn names_a_secret(name: &str) -> bool {
    const SECRET: [&str; 10] = [
        "apikey",
        "auth",
        "credential",
        "credentials",
        "key",
        "password",
        "pword",
        "passwd",
        "secret",
        "token",
    ];
    const HARMLESS: [&str; 3] = ["public", "file", "version"];
    let name = name.to_ascii_lowercase();
    let has = |words: &[&str]| name.split('_').any(|word| words.contains(&word));
    has(&SECRET) && !has(&HARMLESS)
}

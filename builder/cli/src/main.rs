//! `slipway`: builds images into the node's store and looks after what is there. This file parses, dispatches, and
//! turns outcomes into exit codes; it knows nothing of what the commands do.
#![forbid(unsafe_code)]

/// `print!` to a reader who may have seen enough: that is no reason to fail.
macro_rules! out {
    ($($arg:tt)*) => { $crate::text::to_stdout(format_args!($($arg)*)) };
}

/// `println!` to a reader who may have seen enough.
macro_rules! outln {
    ($($arg:tt)*) => { out!("{}\n", format_args!($($arg)*)) };
}

mod args;
mod build;
mod completion;
mod display;
mod images;
mod inspect;
mod places;
mod secrets;
mod text;
mod transfer;

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;
use slipway_engine::{BuildError, Cancel, Surroundings};
use slipway_image::{OwnerKind, Store};
use tokio::signal::unix::{SignalKind, signal};

use args::{Cli, Command};
use places::Places;

/// Why a command ended badly.
#[derive(Debug)]
pub enum Failure {
    /// A build; it prints itself over several lines.
    Build(Box<BuildError>),
    /// Anything else.
    Other(anyhow::Error),
    /// SIGINT or SIGTERM.
    Interrupted,
}

impl<E: Into<anyhow::Error>> From<E> for Failure {
    fn from(error: E) -> Failure {
        Failure::Other(error.into())
    }
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Err(error) = log_to_stderr(&cli.global.log_level) {
        eprintln!("slipway: --log-level {:?}: {error}", cli.global.log_level);
        return ExitCode::from(2);
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("slipway: cannot start: {error}");
            return ExitCode::FAILURE;
        }
    };
    let outcome = runtime.block_on(dispatch(cli));
    // Work that hangs in the kernel must not keep us.
    runtime.shutdown_timeout(std::time::Duration::from_secs(2));
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::Interrupted) => {
            eprintln!("slipway: interrupted");
            ExitCode::from(130)
        }
        Err(Failure::Build(error)) => {
            complain(&slipway_engine::chain(&*error).to_string());
            ExitCode::FAILURE
        }
        Err(Failure::Other(error)) => {
            complain(&format!("{error:#}"));
            ExitCode::FAILURE
        }
    }
}

/// Errors go to stderr, whoever listens. What they quote may come from an image or a registry: nothing of it may
/// speak to the terminal.
fn complain(text: &str) {
    let text: Vec<String> = text
        .lines()
        .map(|line| slipway_engine::printable(line.as_bytes()))
        .collect();
    let _ = writeln!(std::io::stderr().lock(), "slipway: {}", text.join("\n"));
}

/// A word alone is a level: as a filter a misspelt one would be a target that nothing has, and silence.
fn log_to_stderr(level: &str) -> anyhow::Result<()> {
    let alone = level.split(',').filter(|word| !word.contains(['=', '[', ':']));
    for word in alone {
        anyhow::ensure!(
            word.trim()
                .parse::<tracing_subscriber::filter::LevelFilter>()
                .is_ok(),
            "{word:?} is none of off, error, warn, info, debug, trace"
        );
    }
    let filter: tracing_subscriber::EnvFilter = level.parse()?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .init();
    Ok(())
}

async fn dispatch(cli: Cli) -> Result<(), Failure> {
    match cli.command {
        Command::Completion { shell } => {
            completion::print(shell);
            return Ok(());
        }
        Command::Version { format } => return Ok(inspect::version(format.format)?),
        _ => {}
    }
    let places = Places::resolve(&cli.global)?;
    let cancel = Cancel::new();
    let command = run(&places, cli.command, cancel.clone());
    tokio::pin!(command);
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hangup = signal(SignalKind::hangup())?;
    // The command ends by itself once it is told, so that it can undo what it has made.
    tokio::select! {
        outcome = &mut command => return outcome,
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
        _ = hangup.recv() => {}
    }
    cancel.set();
    tokio::select! {
        outcome = &mut command => match outcome {
            Ok(()) => Ok(()),
            Err(_) => Err(Failure::Interrupted),
        },
        // Who cannot wait leaves the undoing to the next command.
        _ = interrupt.recv() => Err(Failure::Interrupted),
    }
}

async fn run(places: &Places, command: Command, cancel: Cancel) -> Result<(), Failure> {
    if let Command::Build(args) = command {
        return build::run(places, *args, cancel).await;
    }
    let store = match command {
        Command::Pull(_) | Command::Load(_) => places.store(OwnerKind::Cli).await?,
        _ => places.store_that_is_there(OwnerKind::Cli).await?,
    };
    sweep(&store, &places.surroundings()).await;
    match command {
        Command::Push(args) => transfer::push(places, &store, args, cancel).await,
        Command::Pull(args) => transfer::pull(places, &store, args, cancel).await,
        Command::Load(args) => transfer::load(&store, args, cancel).await,
        Command::Save(args) => transfer::save(&store, args, cancel).await,
        Command::Images(args) => Ok(images::list(&store, &args).await?),
        Command::Tag(args) => Ok(images::tag(&store, args).await?),
        Command::Rmi(args) => Ok(images::remove(&store, args).await?),
        Command::Prune(args) => Ok(images::prune(&store, &args).await?),
        Command::Inspect(args) => Ok(inspect::inspect(&store, args).await?),
        Command::History(args) => Ok(inspect::history(&store, args).await?),
        Command::Build(_) | Command::Completion { .. } | Command::Version { .. } => Ok(()),
    }
}

/// Undoes what dead builds left. Never a reason to fail: the next command tries again.
pub async fn sweep(store: &Store, around: &Surroundings) {
    if let Err(error) = slipway_engine::sweep(store, around).await {
        complain(&format!("warning: {}", slipway_engine::chain(&error)));
    }
}

//! slipwayd: the CRI runtime. This crate wires the others together and owns what a pod and a container are: their
//! records, their states, the order in which things are made and undone.
//!
//! It refuses to know how an image is stored, a namespace made, a process started or a plugin run; those are the crates
//! below. The map of the whole is ARCHITECTURE.md; the way of one request is `rpc` → `pod` or `container` → the crates.

#![forbid(unsafe_code)]

mod apparmor;
mod blocking;
mod cli;
mod config;
mod container;
mod daemon;
mod error;
mod events;
mod fail;
mod ids;
mod image;
mod instance;
mod logging;
mod memory;
mod model;
mod op;
mod pod;
mod pod_cidr;
mod records;
mod recover;
mod registry;
mod rpc;
mod serve;
mod stream;
mod systemd;
mod time;
mod version;

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use clap::Parser as _;

use crate::cli::{Cli, Command, ConfigCommand};
use crate::config::{Config, DEFAULT_TOML};

/// Threads that wait for events; verbs are short between their awaits.
const WORKERS: usize = 2;
/// Threads for files, mounts and SQLite: a burst of pods uses some, an idle node keeps none. Each pull holds one while it
/// waits for those that write its layers, so there are many more than [`daemon::PULLS`].
const BLOCKING: usize = 128;
const BLOCKING_IDLE: Duration = Duration::from_secs(1);

/// The whole program, but for its exit code's way out.
///
/// # Errors
/// What kept it from starting, or from ending in order.
pub fn main() -> anyhow::Result<ExitCode> {
    let cli = Cli::parse();
    match cli.command {
        Some(Command::Config(ConfigCommand::Default)) => print!("{DEFAULT_TOML}"),
        Some(Command::Config(ConfigCommand::Check)) => {
            let config = Config::load(&cli.flags)?;
            container::blockio::Classes::load(config.runtime.blockio_config_file.as_deref())?;
            print!("{}", config.to_toml());
        }
        Some(Command::Failpoints) => {
            fail::ALL.iter().for_each(|name| println!("{name}"));
            slipway_image::FAILPOINTS
                .iter()
                .for_each(|name| println!("store.{name}"));
        }
        None => {
            memory::settle();
            let config = Config::load(&cli.flags)?;
            logging::init(&config.log)?;
            // Connections, streams and shims; containers get the usual number again.
            slipway_sys::exec::raise_descriptors()?;
            fail::init_from_env()?;
            let threads = tokio::runtime::Builder::new_multi_thread()
                .worker_threads(WORKERS)
                .max_blocking_threads(BLOCKING)
                .thread_keep_alive(BLOCKING_IDLE)
                .thread_name("slipwayd")
                .enable_all()
                .build()
                .context("cannot start the threads")?;
            let served = threads.block_on(serve::serve(config));
            // A thread that hangs in a system call must not keep the process.
            threads.shutdown_timeout(Duration::from_secs(1));
            served?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

//! containerd-shim-slipway-v1: holds one pod's containers, whatever becomes of who started them.
//!
//! A single thread around an epoll loop ([`shim`]): ttrpc in and out ([`conn`], [`service`]), containers ([`task`],
//! [`create`], [`start`], [`ending`], [`exec`]), their streams ([`stdio`], [`streams`], [`pump`], [`log`]), the pod around them
//! ([`pod`]). It links neither an async runtime nor libcontainer: what those would cost is paid once a pod. Containers are
//! created by a program of their own ([`worker`]).
#![forbid(unsafe_code)]

mod args;
mod cleanup;
mod clock;
mod conn;
mod containerd;
mod create;
mod diag;
mod ending;
mod events;
mod exec;
mod fault;
mod log;
mod mounts;
mod oom;
mod pod;
mod publish;
mod pump;
mod reactor;
mod record;
mod service;
mod shim;
mod spec;
mod start;
mod stats;
mod stdio;
mod streams;
mod task;
mod tree;
mod worker;

use args::Command;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::process::ExitCode;

/// Of this program and of what it speaks.
const VERSION: &str = env!("CARGO_PKG_VERSION");

fn main() -> ExitCode {
    match args::parse(std::env::args_os().skip(1))
        .map_err(Into::into)
        .and_then(run)
    {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            diag::error!("{}", diag::Chain(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<(), Box<dyn std::error::Error>> {
    match command {
        Command::Pod {
            id,
            state_dir,
            worker,
            containerd,
            log_level,
        } => {
            diag::set_level(&log_level);
            serve(id, state_dir, worker, containerd)?;
        }
        Command::Cleanup { state_dir, all } => {
            let report = cleanup::run(&state_dir, all)?;
            io::stdout().write_all(&serde_json::to_vec(&report)?)?;
        }
        Command::Start(flags) => containerd::start(&flags)?,
        Command::Delete(flags) => containerd::delete(&flags)?,
        Command::Info => containerd::info()?,
        Command::Version => writeln!(io::stdout(), "containerd-shim-slipway-v1 {VERSION}")?,
    }
    Ok(())
}

/// Serves on the socket that is stdin until there is nothing more to do.
fn serve(id: String, state_dir: PathBuf, worker: PathBuf, containerd: Option<String>) -> io::Result<()> {
    let listener = take_listener()?;
    // A session of its own: no terminal's hang-up reaches it. An error means that it has one already.
    let _ = rustix::process::setsid();
    rustix::process::chdir("/")?;
    let publisher = containerd.map(|namespace| {
        let address = std::env::var("TTRPC_ADDRESS").unwrap_or_default();
        publish::Publisher::new(&address, &namespace)
    });
    let under_containerd = publisher.is_some();
    let config = shim::Config {
        id,
        state_dir: state_dir.clone(),
        worker,
    };
    let mut shim = shim::Shim::new(config, listener, publisher)?;
    shim.run()?;
    if under_containerd {
        // Nobody else knows of it.
        std::fs::remove_dir_all(&state_dir)?;
    }
    Ok(())
}

/// Moves the listening socket out of the way of stdin, which becomes /dev/null.
fn take_listener() -> io::Result<OwnedFd> {
    use rustix::fs::{Mode, OFlags};
    let listener = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3)?;
    if !rustix::net::sockopt::socket_acceptconn(&listener)? {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "stdin is no listening socket",
        ));
    }
    let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    rustix::stdio::dup2_stdin(null.as_fd())?;
    Ok(listener)
}

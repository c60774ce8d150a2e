//! containerd-shim-slipway-v1: holds one pod's containers, whatever becomes of who started them.
//!
//! A single thread around an epoll loop ([`shim`]): ttrpc in and out ([`conn`], [`service`]), containers ([`task`],
//! [`create`], [`start`], [`ending`], [`exec`], [`begin`]), their streams ([`stdio`], [`streams`], [`pump`], [`log`]), the pod around them
//! ([`pod`]). It links neither an async runtime nor libcontainer: what those would cost is paid once a pod. Containers are
//! created by a program of their own ([`worker`]).
//!
//! There is no unsafe code, but one attribute: the entry is C's `main`, without the runtime that Rust's would set up first
//! (a second stack for signal handlers, a name for the thread: three pages a pod, for nothing used here).
#![deny(unsafe_code)]
#![cfg_attr(not(test), no_main)]

mod args;
mod begin;
mod cleanup;
mod clock;
mod conn;
mod containerd;
mod create;
mod diag;
mod early;
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
mod update;
mod worker;

use args::Command;
use std::ffi::OsString;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

/// Of this program and of what it speaks.
const VERSION: &str = env!("CARGO_PKG_VERSION");

/// The program's entry.
#[cfg(not(test))]
#[allow(
    unsafe_code,
    reason = "the name is what the C library's start-up code calls; nothing else has it"
)]
#[unsafe(no_mangle)]
extern "C" fn main() -> i32 {
    enter()
}

fn enter() -> i32 {
    let run = || run(args::parse(arguments()?)?);
    match run() {
        Ok(()) => 0,
        Err(error) => {
            diag::error!("{}", diag::Chain(error.as_ref()));
            1
        }
    }
}

/// The command line without the program's name. Rust's own list is filled by the runtime that is not there.
fn arguments() -> io::Result<impl Iterator<Item = OsString>> {
    let mut line = std::fs::read("/proc/self/cmdline")?;
    // Each argument ends with a zero byte, the last one too.
    line.pop();
    let words: Vec<OsString> = line
        .split(|byte| *byte == 0)
        .map(|word| OsString::from_vec(word.to_vec()))
        .collect();
    Ok(words.into_iter().skip(1))
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
            print(&serde_json::to_vec(&report)?)?;
        }
        Command::Start(flags) => containerd::start(&flags)?,
        Command::Delete(flags) => containerd::delete(&flags)?,
        Command::Info => containerd::info()?,
        Command::Version => print(format!("containerd-shim-slipway-v1 {VERSION}\n").as_bytes())?,
    }
    Ok(())
}

/// Writes to stdout, all the way: without the runtime nobody does that at the end.
///
/// # Errors
/// When nobody reads.
fn print(text: &[u8]) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text)?;
    out.flush()
}

/// Serves on the socket that is stdin until there is nothing more to do.
fn serve(id: String, state_dir: PathBuf, worker: PathBuf, containerd: Option<String>) -> io::Result<()> {
    let listener = take_listener()?;
    // It was executed by the number of a descriptor.
    slipway_sys::process::set_name(c"containerd-shim")?;
    // Streams, logs and execs of many containers; what runs in those gets the usual number again.
    slipway_sys::exec::raise_descriptors()?;
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
        slipway_sys::mount::remove_tree(&state_dir)?;
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

#[cfg(test)]
mod tests {
    #[test]
    fn the_command_line_is_found_without_the_runtime() {
        let expected: Vec<_> = std::env::args_os().skip(1).collect();
        assert_eq!(super::arguments().expect("read").collect::<Vec<_>>(), expected);
        assert_eq!(super::enter(), 1, "a test harness's arguments are none of ours");
    }
}

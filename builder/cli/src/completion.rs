//! `slipway completion`: scripts for shells, made of the flags themselves.

use clap::CommandFactory;

use crate::args::{Cli, Shell};

/// Prints the script for a shell.
pub fn print(shell: Shell) {
    let shell = match shell {
        Shell::Bash => clap_complete::Shell::Bash,
        Shell::Zsh => clap_complete::Shell::Zsh,
        Shell::Fish => clap_complete::Shell::Fish,
    };
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "slipway", &mut script);
    // A reader that has seen enough is no failure.
    let _ = std::io::Write::write_all(&mut std::io::stdout().lock(), &script);
}

//! The command line: flags and subcommands as typed. It refuses to know what a configuration means; see `config`.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

/// Slipway's container runtime for Kubernetes (CRI v1).
#[derive(Debug, Parser)]
#[command(name = "slipwayd", version, about, long_about = None)]
pub struct Cli {
    #[command(flatten)]
    pub flags: Flags,
    #[command(subcommand)]
    pub command: Option<Command>,
}

/// What overrides the configuration file.
#[derive(Debug, Clone, Default, Args)]
pub struct Flags {
    /// Configuration file [default: /etc/slipway/config.toml where that exists]
    #[arg(long, value_name = "FILE", global = true)]
    pub config: Option<PathBuf>,
    /// What survives a reboot: images, snapshots, records [default: /var/lib/slipway]
    #[arg(long, value_name = "DIR", global = true)]
    pub root: Option<PathBuf>,
    /// What does not: sockets, namespaces, bundles; wants a tmpfs [default: /run/slipway]
    #[arg(long, value_name = "DIR", global = true)]
    pub state: Option<PathBuf>,
    /// The CRI socket [default: <state>/slipwayd.sock]
    #[arg(long, value_name = "PATH", global = true)]
    pub socket: Option<PathBuf>,
    /// error, warn, info, debug, trace, or a filter like "info,slipway_image=debug"
    #[arg(long, value_name = "LEVEL", global = true)]
    pub log_level: Option<String>,
    /// Where CNI network configurations are read from [default: /etc/cni/net.d]
    #[arg(long, value_name = "DIR", global = true)]
    pub cni_conf_dir: Option<PathBuf>,
    /// Where CNI plugins are looked for; may be given more than once [default: /opt/cni/bin and /usr/lib/cni]
    #[arg(long, value_name = "DIR", global = true)]
    pub cni_bin_dir: Vec<PathBuf>,
    /// Where the id of this boot of the machine is read from: another file plays a reboot (for tests)
    #[arg(long, value_name = "FILE", hide = true)]
    pub boot_id_file: Option<PathBuf>,
}

/// What to do instead of serving.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Look at the configuration
    #[command(subcommand)]
    Config(ConfigCommand),
    /// List the points at which SLIPWAY_FAILPOINTS can make slipwayd die, err or wait (for tests)
    Failpoints,
}

/// What can be asked about the configuration.
#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Print the default configuration file, with comments
    Default,
    /// Read the configuration as serving would, print what it resolves to, or say what is wrong and where
    Check,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn flags_are_accepted_before_and_after_a_subcommand() {
        let cli =
            Cli::try_parse_from(["slipwayd", "--root", "/a", "config", "check", "--state", "/b"]).unwrap();
        assert_eq!(cli.flags.root, Some(PathBuf::from("/a")));
        assert_eq!(cli.flags.state, Some(PathBuf::from("/b")));
    }
}

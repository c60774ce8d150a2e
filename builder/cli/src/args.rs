//! The command line as typed: every flag of docker's that people write, and no meaning yet. Knows no store.

use std::path::PathBuf;

use clap::{ArgAction, Args, Parser, Subcommand, ValueEnum};

/// Builds images from Dockerfiles straight into the node's store, and looks after what is there.
#[derive(Debug, Parser)]
#[command(
    name = "slipway",
    version,
    max_term_width = 110,
    subcommand_required = true,
    arg_required_else_help = true
)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

/// What every command takes.
#[derive(Debug, Clone, Default, Args)]
pub struct Global {
    /// The store [default: /var/lib/slipway]
    #[arg(
        long,
        global = true,
        value_name = "DIR",
        env = "SLIPWAY_ROOT",
        help_heading = "Places",
        hide_env_values = true
    )]
    pub root: Option<PathBuf>,
    /// What does not survive a reboot [default: /run/slipway]
    #[arg(
        long,
        global = true,
        value_name = "DIR",
        env = "SLIPWAY_STATE",
        help_heading = "Places",
        hide_env_values = true
    )]
    pub state: Option<PathBuf>,
    /// slipwayd's configuration file, for places and registries [default: /etc/slipway/config.toml where it exists]
    #[arg(long, global = true, value_name = "FILE", help_heading = "Places")]
    pub config: Option<PathBuf>,
    /// A tree of hosts.toml files: mirrors and TLS of registries [default: /etc/slipway/certs.d]
    #[arg(long, global = true, value_name = "DIR", help_heading = "Places")]
    pub certs_dir: Option<PathBuf>,
    /// Where CNI network configurations are read from [default: /etc/cni/net.d]
    #[arg(long, global = true, value_name = "DIR", help_heading = "Places")]
    pub cni_conf_dir: Option<PathBuf>,
    /// Where CNI plugins are looked for; may be given more than once [default: /opt/cni/bin and /usr/lib/cni]
    #[arg(long, global = true, value_name = "DIR", help_heading = "Places")]
    pub cni_bin_dir: Vec<PathBuf>,
    /// Where CDI files are looked for, the folder that wins last; may be given more than once [default: /etc/cdi and
    /// /var/run/cdi]
    #[arg(long, global = true, value_name = "DIR", help_heading = "Places")]
    pub cdi_spec_dir: Vec<PathBuf>,
    /// error, warn, info, debug, trace, or a filter like "warn,slipway_engine=debug"; on stderr
    #[arg(
        long,
        global = true,
        value_name = "LEVEL",
        default_value = "error",
        help_heading = "Places"
    )]
    pub log_level: String,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Build an image from a Dockerfile
    Build(Box<BuildArgs>),
    /// Send an image to its registry
    Push(PushArgs),
    /// Fetch an image from a registry
    Pull(PullArgs),
    /// List images
    Images(ImagesArgs),
    /// Give an image another name
    Tag(TagArgs),
    /// Take names away, and images without names out of the store
    Rmi(RmiArgs),
    /// Load images from an archive of docker save or an OCI layout
    Load(LoadArgs),
    /// Write images into an archive
    Save(SaveArgs),
    /// Show everything about images
    Inspect(InspectArgs),
    /// Show the steps an image is made of
    History(HistoryArgs),
    /// Free what nobody needs: the build cache, builds without a name, layers, blobs that can be made again
    Prune(PruneArgs),
    /// Print a completion script for a shell
    Completion {
        /// Which shell
        #[arg(value_enum)]
        shell: Shell,
    },
    /// Print the version
    Version {
        #[command(flatten)]
        format: FormatArg,
    },
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum Shell {
    Bash,
    Zsh,
    Fish,
}

/// `--format`.
#[derive(Debug, Clone, Copy, Default, Args)]
pub struct FormatArg {
    /// How to print
    #[arg(long, value_enum, default_value_t)]
    pub format: Format,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum Format {
    #[default]
    Table,
    Json,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum ProgressMode {
    /// tty on a terminal, else plain
    #[default]
    Auto,
    /// A line for each thing that happens
    Plain,
    /// A live display
    Tty,
}

#[derive(Debug, Args)]
#[command(
    after_help = "The context is the directory whose files COPY and ADD can take, usually `.`; `-` reads a tar archive \
                  (or a Dockerfile alone) from stdin. It may stand anywhere among the flags."
)]
pub struct BuildArgs {
    /// Name of the image, name[:tag]; may be given more than once
    #[arg(short, long, value_name = "NAME")]
    pub tag: Vec<String>,
    /// The Dockerfile [default: CONTEXT/Dockerfile]; `-` reads it from stdin
    #[arg(short, long, value_name = "FILE")]
    pub file: Option<PathBuf>,
    /// Value of an ARG; a name alone takes its value from the environment
    #[arg(long, value_name = "NAME[=VALUE]")]
    pub build_arg: Vec<String>,
    /// Build this stage
    #[arg(long, value_name = "STAGE")]
    pub target: Option<String>,
    /// Label of the image
    #[arg(long, value_name = "NAME=VALUE")]
    pub label: Vec<String>,
    /// Read labels from a file, one a line
    #[arg(long, value_name = "FILE")]
    pub label_file: Vec<PathBuf>,
    /// Run every step, whatever the cache holds
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false", hide_default_value = true, action = ArgAction::Set, hide_possible_values = true)]
    pub no_cache: bool,
    /// Ask the registry for newer base images
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false", hide_default_value = true, action = ArgAction::Set, hide_possible_values = true)]
    pub pull: bool,
    /// Network of RUN: through CNI where it is configured, the host's, or none
    #[arg(long, value_enum, default_value = "default", value_name = "NETWORK")]
    pub network: NetworkMode,
    /// A secret that RUN --mount=type=secret may see: of a file, or of a variable; in no layer, key or log. Where the
    /// mount has env=, it is in the step's config.json below the state directory while the step runs, for root only
    #[arg(long, value_name = "id=ID[,src=FILE|,env=NAME]")]
    pub secret: Vec<String>,
    /// Give every RUN a device of this machine's CDI files: vendor.com/class=name, or vendor.com/class for the first of
    /// them, or vendor.com/class=* for all; may be given more than once. What it brings is in no layer
    #[arg(long, value_name = "DEVICE")]
    pub device: Vec<String>,
    /// Let RUN ask for what a Dockerfile cannot give itself: network.host, device (any), device=DEVICE,
    /// device=DEVICE,alias=NAME (by what the Dockerfile calls it)
    #[arg(long, value_name = "GRANT")]
    pub allow: Vec<String>,
    /// Push the image to its registry after the build
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false", hide_default_value = true, action = ArgAction::Set, hide_possible_values = true)]
    pub push: bool,
    /// How progress is shown
    #[arg(long, value_enum, default_value = "auto", value_name = "MODE")]
    pub progress: ProgressMode,
    /// Print nothing but the image's id
    #[arg(short, long)]
    pub quiet: bool,
    /// Write the image's id into a file
    #[arg(long, value_name = "FILE")]
    pub iidfile: Option<PathBuf>,
    /// Only this machine's own is possible
    #[arg(long, value_name = "PLATFORM")]
    pub platform: Option<String>,
    /// Accepted: intermediate containers are always removed
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", hide_possible_values = true)]
    pub rm: Option<bool>,
    /// Accepted: intermediate containers are always removed
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", hide = true)]
    pub force_rm: Option<bool>,
    /// Accepted: the image is always in the node's store
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", hide = true)]
    pub load: Option<bool>,
    /// Accepted with false: no attestations are made
    #[arg(long, value_name = "VALUE", hide = true, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub provenance: Vec<String>,
    /// Accepted with false: no attestations are made
    #[arg(long, value_name = "VALUE", hide = true, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub sbom: Vec<String>,
    #[command(flatten)]
    pub not_built: NotBuilt,
    /// The files that COPY and ADD can take: a directory, or - for a tar archive or a Dockerfile on stdin
    #[arg(value_name = "CONTEXT")]
    pub context: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum NetworkMode {
    Default,
    Host,
    None,
}

macro_rules! not_built {
    (values: $($value:ident = $long:literal),*; switches: $($switch:ident = $switch_long:literal),* $(,)?) => {
        /// Flags of docker build that mean something we cannot do yet: using one is an error that names it.
        #[derive(Debug, Default, Args)]
        pub struct NotBuilt {
            $(#[arg(long = $long, hide = true, value_name = "VALUE", allow_hyphen_values = true)] $value: Vec<String>,)*
            $(#[arg(long = $switch_long, hide = true)] $switch: bool,)*
            /// -o
            #[arg(short = 'o', hide = true, value_name = "VALUE")]
            short_output: Vec<String>,
            /// -m
            #[arg(short = 'm', hide = true, value_name = "VALUE")]
            short_memory: Vec<String>,
        }

        impl NotBuilt {
            /// Those that were given, as written.
            pub fn given(&self) -> Vec<&'static str> {
                let mut given = Vec::new();
                $(if !self.$value.is_empty() { given.push(concat!("--", $long)); })*
                $(if self.$switch { given.push(concat!("--", $switch_long)); })*
                if !self.short_output.is_empty() { given.push("-o"); }
                if !self.short_memory.is_empty() { given.push("-m"); }
                given
            }
        }
    };
}

not_built! {
    values:
        add_host = "add-host", annotation = "annotation", attest = "attest",
        build_context = "build-context", builder = "builder", cache_from = "cache-from", cache_to = "cache-to",
        call = "call", cgroup_parent = "cgroup-parent", cpu_period = "cpu-period", cpu_quota = "cpu-quota",
        cpu_shares = "cpu-shares", cpuset_cpus = "cpuset-cpus", cpuset_mems = "cpuset-mems",
        isolation = "isolation", memory = "memory", memory_swap = "memory-swap",
        metadata_file = "metadata-file", no_cache_filter = "no-cache-filter", output = "output",
        security_opt = "security-opt",
        shm_size = "shm-size", ssh = "ssh", ulimit = "ulimit";
    switches:
        check = "check", squash = "squash", compress = "compress", debug = "debug",
}

#[derive(Debug, Args)]
pub struct PushArgs {
    /// The image; its name says which registry
    #[arg(value_name = "NAME")]
    pub name: String,
    /// Print nothing but the digest
    #[arg(short, long)]
    pub quiet: bool,
    #[command(flatten)]
    pub format: FormatArg,
}

#[derive(Debug, Args)]
pub struct PullArgs {
    /// The image
    #[arg(value_name = "NAME")]
    pub name: String,
    /// Another platform than this machine's
    #[arg(long, value_name = "PLATFORM")]
    pub platform: Option<String>,
    /// Print nothing but the image's id
    #[arg(short, long)]
    pub quiet: bool,
    #[command(flatten)]
    pub format: FormatArg,
}

#[derive(Debug, Args)]
pub struct ImagesArgs {
    /// Only images with this name, or repository
    #[arg(value_name = "NAME")]
    pub name: Option<String>,
    /// Print ids only
    #[arg(short, long)]
    pub quiet: bool,
    /// Print whole ids
    #[arg(long)]
    pub no_trunc: bool,
    #[command(flatten)]
    pub format: FormatArg,
}

#[derive(Debug, Args)]
pub struct TagArgs {
    /// The image: a name or an id
    #[arg(value_name = "IMAGE")]
    pub image: String,
    /// Its new name
    #[arg(value_name = "NAME")]
    pub name: String,
}

#[derive(Debug, Args)]
pub struct RmiArgs {
    /// Names or ids
    #[arg(value_name = "IMAGE", required = true)]
    pub images: Vec<String>,
    /// With an id: also when the image has several names
    #[arg(short, long)]
    pub force: bool,
}

#[derive(Debug, Args)]
pub struct LoadArgs {
    /// The archive [default: stdin]
    #[arg(short, long, value_name = "FILE")]
    pub input: Option<PathBuf>,
    /// Print nothing
    #[arg(short, long)]
    pub quiet: bool,
    #[command(flatten)]
    pub format: FormatArg,
}

#[derive(Debug, Args)]
pub struct SaveArgs {
    /// Names or ids
    #[arg(value_name = "IMAGE", required = true)]
    pub images: Vec<String>,
    /// The archive [default: stdout]
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// The archive's form
    #[arg(long, value_enum, default_value = "docker")]
    pub format: ArchiveForm,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ArchiveForm {
    /// What docker load reads
    Docker,
    /// OCI image layout
    Oci,
}

#[derive(Debug, Args)]
pub struct InspectArgs {
    /// Names or ids
    #[arg(value_name = "IMAGE", required = true)]
    pub images: Vec<String>,
    #[command(flatten)]
    pub format: FormatArg,
}

#[derive(Debug, Args)]
pub struct HistoryArgs {
    /// A name or an id
    #[arg(value_name = "IMAGE")]
    pub image: String,
    /// Print whole lines
    #[arg(long)]
    pub no_trunc: bool,
    #[command(flatten)]
    pub format: FormatArg,
}

#[derive(Debug, Args)]
pub struct PruneArgs {
    /// Keep the build cache that was used within this time (as in 12h, 7d)
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub unused_for: Option<std::time::Duration>,
    /// Keep the newest build cache up to this size (as in 500MB, 20GB)
    #[arg(long, value_name = "SIZE", value_parser = bytes)]
    pub keep_storage: Option<u64>,
    #[command(flatten)]
    pub format: FormatArg,
}

/// `90s`, `15m`, `12h`, `7d`.
fn duration(text: &str) -> Result<std::time::Duration, String> {
    let wrong = || format!("{text:?} is not a time like 90s, 15m, 12h or 7d");
    let (digits, unit) = text.split_at(text.len() - text.chars().next_back().map_or(0, char::len_utf8));
    let number: u64 = digits.parse().map_err(|_| wrong())?;
    let seconds = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 86400,
        _ => return Err(wrong()),
    };
    number
        .checked_mul(seconds)
        .map(std::time::Duration::from_secs)
        .ok_or_else(wrong)
}

/// `500`, `500MB`, `20GB`, `1GiB`.
fn bytes(text: &str) -> Result<u64, String> {
    let wrong = || format!("{text:?} is not a size like 500MB or 20GB");
    let split = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let number: f64 = text[..split].parse().map_err(|_| wrong())?;
    let unit = match text[split..].trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "k" | "kb" => 1e3,
        "m" | "mb" => 1e6,
        "g" | "gb" => 1e9,
        "t" | "tb" => 1e12,
        "kib" => 1024.0,
        "mib" => 1024.0 * 1024.0,
        "gib" => 1024.0 * 1024.0 * 1024.0,
        _ => return Err(wrong()),
    };
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // sizes of disks
    Ok((number * unit) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn build(line: &[&str]) -> BuildArgs {
        let words = ["slipway", "build"].iter().chain(line);
        match Cli::try_parse_from(words).unwrap().command {
            Command::Build(args) => *args,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_context_stands_anywhere_and_flags_are_spelled_as_docker_does() {
        for line in [
            vec![".", "-t", "a:1", "--build-arg", "V=one", "--rm"],
            vec!["-t", "a:1", ".", "--build-arg=V=one", "--rm=true"],
            vec!["--rm", "--tag=a:1", "--build-arg", "V=one", "."],
            vec!["--tag", "a:1", "--rm=false", "--build-arg", "V=one", "."],
        ] {
            let args = build(&line);
            assert_eq!(
                args.context.as_deref(),
                Some(std::path::Path::new(".")),
                "{line:?}"
            );
            assert_eq!(
                (args.tag, args.build_arg),
                (vec!["a:1".into()], vec!["V=one".into()]),
                "{line:?}"
            );
        }
    }

    #[test]
    fn no_cache_and_pull_take_a_value_only_after_an_equals_sign() {
        let args = build(&["--no-cache", ".", "--pull=false"]);
        assert!(args.no_cache && !args.pull && args.context.is_some());
    }

    #[test]
    fn flags_that_are_not_built_are_known_by_name() {
        let args = build(&["--ssh", "default", ".", "--squash", "-o", "type=tar"]);
        assert_eq!(args.not_built.given(), ["--ssh", "--squash", "-o"]);
        assert!(args.context.is_some());
    }

    #[test]
    fn switches_take_a_value_after_an_equals_sign_as_buildx_has_them() {
        let args = build(&[
            "--push=false",
            "--load=true",
            "--provenance=false",
            "--sbom=false",
            ".",
        ]);
        assert!(!args.push && args.load == Some(true));
        assert_eq!(
            (args.provenance, args.sbom),
            (vec!["false".into()], vec!["false".into()])
        );
        assert!(build(&["--push", "."]).push && build(&["--load", "."]).load == Some(true));
    }

    #[test]
    fn stdin_can_be_context_and_dockerfile() {
        let args = build(&["-f", "-", "-"]);
        assert_eq!(args.file.as_deref(), Some(std::path::Path::new("-")));
        assert_eq!(args.context.as_deref(), Some(std::path::Path::new("-")));
    }

    #[test]
    fn times_and_sizes_are_read() {
        assert_eq!(duration("7d").unwrap().as_secs(), 7 * 86400);
        assert!(duration("7").is_err() && duration("").is_err() && duration("xs").is_err());
        assert_eq!(bytes("1.5GB").unwrap(), 1_500_000_000);
        assert_eq!(bytes("10").unwrap(), 10);
        assert!(bytes("ten").is_err());
    }
}

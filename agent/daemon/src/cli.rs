//! The program's verbs, and what each prints.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::{Parser, Subcommand};
use slipway_cdi::{Cache, Spec};
use slipway_gpu::Supervisor;

use crate::config::{Config, DEFAULT_PATH, DEFAULT_TOML, LogFormat};
use crate::{cdi, control, hook, run};

/// The GPUs of a node, for kubelet and for container runtimes. Without a verb: runs as the node's agent.
#[derive(Debug, Parser)]
#[command(name = "slipway-agent", version)]
struct Args {
    /// The configuration file.
    #[arg(long, global = true, value_name = "FILE", help = format!("The configuration file [default: {DEFAULT_PATH}, if there is one]"))]
    config: Option<PathBuf>,
    #[command(subcommand)]
    verb: Option<Verb>,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// The configuration.
    Config {
        #[command(subcommand)]
        verb: ConfigVerb,
    },
    /// CDI files, by which container runtimes give devices to containers.
    Cdi {
        #[command(subcommand)]
        verb: CdiVerb,
    },
    /// The GPUs that NVML lists, as JSON.
    List,
    /// The running agent's hold on the driver, for whoever divides a GPU or unloads the driver.
    Gpu {
        #[command(subcommand)]
        verb: GpuVerb,
    },
    /// Does a hook of the CDI file, for container runtimes.
    #[command(hide = true, disable_help_flag = true)]
    CdiHook {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Talks to NVML for the agent.
    #[command(hide = true)]
    NvmlChild { library: PathBuf, sys: PathBuf },
}

#[derive(Debug, Subcommand)]
enum ConfigVerb {
    /// Prints the file that says what holds without one.
    Default,
    /// Checks the file that would be read.
    Check,
}

#[derive(Debug, Subcommand)]
enum GpuVerb {
    /// Has the agent let go of NVML: it has no handle of the driver when this returns. The GPUs stay as they are for kubelet; no
    /// XID is heard meanwhile.
    Release {
        /// When the agent takes it up again by itself, in seconds.
        #[arg(long = "for", value_name = "SECONDS", default_value_t = 3600)]
        seconds: u64,
    },
    /// Has the agent take NVML up again, and look at everything.
    Resume,
    /// Says whether the agent has NVML.
    Status,
}

#[derive(Debug, Subcommand)]
enum CdiVerb {
    /// Makes the file of this node's GPUs.
    Generate {
        /// Where to: a folder. Without it the file is printed.
        #[arg(long, value_name = "FOLDER")]
        output: Option<PathBuf>,
    },
    /// Lists the devices that a runtime would find, and the files that it could not use.
    List {
        /// A folder of CDI files, may be repeated; later ones win. Without one: /etc/cdi, /var/run/cdi and paths.cdi.
        #[arg(long = "spec-dir", value_name = "FOLDER")]
        dirs: Vec<PathBuf>,
    },
    /// Checks files.
    Validate {
        /// The files, .json or .yaml.
        #[arg(required = true)]
        files: Vec<PathBuf>,
    },
}

/// The program.
///
/// # Errors
/// For one line to the operator.
pub fn main() -> Result<ExitCode> {
    let args = Args::parse();
    let load = || Config::load(args.config.as_deref());
    match args.verb {
        None => {
            let config = load()?;
            log(&config)?;
            runtime()?.block_on(run::run(config))?;
        }
        Some(Verb::Config {
            verb: ConfigVerb::Default,
        }) => print(DEFAULT_TOML)?,
        Some(Verb::Config {
            verb: ConfigVerb::Check,
        }) => {
            load()?;
            print("the configuration is valid\n")?;
        }
        Some(Verb::List) => {
            let config = load()?;
            let found = runtime()?.block_on(async {
                let (supervisor, _events) = Supervisor::start(run::launch(&config)?);
                Ok::<_, anyhow::Error>(supervisor.inventory().await?)
            })?;
            print(&format!("{}\n", serde_json::to_string_pretty(&found)?))?;
        }
        Some(Verb::Gpu { verb }) => {
            let line = match verb {
                GpuVerb::Release { seconds } => format!("release {seconds}"),
                GpuVerb::Resume => "resume".into(),
                GpuVerb::Status => "status".into(),
            };
            print(&format!("{}\n", control::ask(&load()?.paths, &line)?))?;
        }
        Some(Verb::Cdi {
            verb: CdiVerb::Generate { output },
        }) => generate(&load()?, output.as_deref())?,
        Some(Verb::Cdi {
            verb: CdiVerb::List { dirs },
        }) => {
            let dirs = match dirs.is_empty() {
                true => folders(&load()?.paths.cdi),
                false => dirs,
            };
            return list(dirs);
        }
        Some(Verb::Cdi {
            verb: CdiVerb::Validate { files },
        }) => return validate(&files),
        Some(Verb::CdiHook { args }) => hook::run(&args).context("cdi-hook")?,
        Some(Verb::NvmlChild { library, sys }) => {
            // Started by no name of its own. Without one it talks as well.
            let _ = rustix::thread::set_name(c"slipway-agent");
            slipway_gpu::child::serve(&library, &sys).context("talk to the agent")?;
            // Threads may hang in the driver: nothing is waited for.
            std::process::exit(0);
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("start the runtime")
}

fn log(config: &Config) -> Result<()> {
    let level: tracing::Level = config.log.level.parse()?;
    let builder = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(std::io::stderr);
    let done = match config.log.format {
        LogFormat::Text => builder.with_ansi(false).try_init(),
        LogFormat::Json => builder.json().try_init(),
    };
    done.map_err(|e| anyhow::anyhow!("start the log: {e}"))
}

/// A reader that goes away is no error.
fn print(text: &str) -> Result<()> {
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => Err(e).context("write to stdout"),
        _ => Ok(()),
    }
}

fn generate(config: &Config, output: Option<&Path>) -> Result<()> {
    let inventory = runtime()?.block_on(async {
        let (supervisor, _events) = Supervisor::start(run::launch(config)?);
        Ok::<_, anyhow::Error>(supervisor.inventory().await?)
    })?;
    for failed in &inventory.failed {
        eprintln!(
            "slipway-agent: GPU {} is left out: {}",
            failed.index, failed.error
        );
    }
    let mut made = cdi::generate(&inventory, &run::roots(config), &config.cdi.kind)?;
    let Some(spec) = made.spec else {
        return match made.left_out.pop_first() {
            Some((_, error)) => Err(error.into()),
            None => bail!("there is no GPU"),
        };
    };
    for (device, error) in made.left_out {
        eprintln!(
            "slipway-agent: {device} is left out: {:#}",
            anyhow::Error::from(error)
        );
    }
    match output {
        None => print(&format!("{}\n", serde_json::to_string_pretty(&spec)?)),
        Some(folder) => {
            cdi::write(&spec, folder)
                .with_context(|| format!("write the CDI file into {}", folder.display()))?;
            print(&format!("{}\n", folder.join(cdi::FILE_NAME).display()))
        }
    }
}

/// The folders that runtimes look into by themselves, and the one that the agent writes into.
fn folders(own: &Path) -> Vec<PathBuf> {
    let mut all: Vec<PathBuf> = slipway_cdi::DEFAULT_DIRS.map(PathBuf::from).into();
    if !all.iter().any(|dir| dir == own) {
        all.push(own.to_owned());
    }
    all
}

fn list(dirs: Vec<PathBuf>) -> Result<ExitCode> {
    let places: Vec<String> = dirs.iter().map(|dir| dir.display().to_string()).collect();
    let cache = Cache::new(dirs);
    let text: String = cache.devices().iter().map(|d| format!("{d}\n")).collect();
    print(&text)?;
    let errors = cache.errors();
    if text.is_empty() && errors.is_empty() {
        eprintln!(
            "slipway-agent: no CDI file in {} has a device",
            places.join(" or ")
        );
    }
    for (path, error) in &errors {
        eprintln!("slipway-agent: {} cannot be used: {error}", path.display());
    }
    Ok(if errors.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn validate(files: &[PathBuf]) -> Result<ExitCode> {
    let mut code = ExitCode::SUCCESS;
    for file in files {
        match check(file) {
            Ok(spec) => print(&format!(
                "{}: valid, {} of {}\n",
                file.display(),
                spec.devices.len(),
                spec.kind
            ))?,
            Err(e) => {
                eprintln!("slipway-agent: {}: {e:#}", file.display());
                code = ExitCode::FAILURE;
            }
        }
    }
    Ok(code)
}

fn check(file: &Path) -> Result<Spec> {
    let text = std::fs::read(file).context("read it")?;
    let spec = match file.extension().and_then(|e| e.to_str()) {
        Some("json") => Spec::from_json(&text)?,
        Some("yaml") => Spec::from_yaml(std::str::from_utf8(&text).context("read it as UTF-8")?)?,
        _ => bail!("its name ends neither in .json nor in .yaml: no runtime reads it"),
    };
    spec.validate()?;
    Ok(spec)
}

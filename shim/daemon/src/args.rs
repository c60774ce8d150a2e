//! The command line, in both its dialects: ours (`pod`, `cleanup`, `serve`) and containerd's (`-flag value … action`).

use std::ffi::OsString;
use std::path::PathBuf;

/// A command line that means nothing.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ArgsError {
    /// Something is missing.
    #[error("{command} needs {option}")]
    Missing {
        /// The command.
        command: &'static str,
        /// The option.
        option: &'static str,
    },
    /// Something is too much.
    #[error("{0:?} is no option here")]
    Unknown(String),
    /// An option without its value.
    #[error("{0} needs a value")]
    NoValue(String),
}

/// What is to be done.
#[derive(Debug, PartialEq, Eq)]
pub enum Command {
    /// Serve a pod on the socket that is stdin.
    Pod {
        /// The pod.
        id: String,
        /// Its state directory.
        state_dir: PathBuf,
        /// slipway-runc
        worker: PathBuf,
        /// Serve containerd, in this namespace.
        containerd: Option<String>,
        /// How much to say.
        log_level: String,
    },
    /// Clean up after a dead shim.
    Cleanup {
        /// Its state directory.
        state_dir: PathBuf,
        /// The network namespace and the pod's cgroup too.
        all: bool,
    },
    /// containerd wants a shim.
    Start(Containerd),
    /// containerd's shim is dead.
    Delete(Containerd),
    /// containerd wants to know what this is.
    Info,
    /// Somebody wants to know which this is.
    Version,
}

/// containerd's flags.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Containerd {
    /// The container.
    pub id: String,
    /// Its namespace.
    pub namespace: String,
    /// containerd's socket.
    pub address: String,
    /// The bundle, when it is not the working directory.
    pub bundle: String,
    /// Say more.
    pub debug: bool,
}

/// Reads a command line, the program's name left out.
///
/// # Errors
/// [`ArgsError`]
pub fn parse(args: impl Iterator<Item = OsString>) -> Result<Command, ArgsError> {
    let mut args = args.peekable();
    match args.peek().and_then(|first| first.to_str()) {
        Some("pod") => {
            args.next();
            pod(args)
        }
        Some("cleanup") => {
            args.next();
            cleanup(args)
        }
        _ => containerd(args),
    }
}

fn value(args: &mut impl Iterator<Item = OsString>, option: &str) -> Result<OsString, ArgsError> {
    args.next().ok_or_else(|| ArgsError::NoValue(option.to_owned()))
}

fn text(value: OsString) -> String {
    value.to_string_lossy().into_owned()
}

fn pod(mut args: impl Iterator<Item = OsString>) -> Result<Command, ArgsError> {
    let (mut id, mut state_dir, mut worker, mut containerd) = (None, None, None, None);
    let mut log_level = String::new();
    while let Some(arg) = args.next() {
        let option = text(arg);
        match option.as_str() {
            "--id" => id = Some(text(value(&mut args, &option)?)),
            "--state-dir" => state_dir = Some(value(&mut args, &option)?.into()),
            "--worker" => worker = Some(value(&mut args, &option)?.into()),
            "--containerd" => containerd = Some(text(value(&mut args, &option)?)),
            "--log-level" => log_level = text(value(&mut args, &option)?),
            _ => return Err(ArgsError::Unknown(option)),
        }
    }
    let missing = |option| ArgsError::Missing {
        command: "pod",
        option,
    };
    Ok(Command::Pod {
        id: id.ok_or(missing("--id"))?,
        state_dir: state_dir.ok_or(missing("--state-dir"))?,
        worker: worker.ok_or(missing("--worker"))?,
        containerd,
        log_level,
    })
}

fn cleanup(mut args: impl Iterator<Item = OsString>) -> Result<Command, ArgsError> {
    let (mut state_dir, mut all) = (None, false);
    while let Some(arg) = args.next() {
        let option = text(arg);
        match option.as_str() {
            "--state-dir" => state_dir = Some(value(&mut args, &option)?.into()),
            "--all" => all = true,
            _ => return Err(ArgsError::Unknown(option)),
        }
    }
    let state_dir = state_dir.ok_or(ArgsError::Missing {
        command: "cleanup",
        option: "--state-dir",
    })?;
    Ok(Command::Cleanup { state_dir, all })
}

/// Go's flags: one or two dashes, the value behind `=` or in the next argument.
fn containerd(mut args: impl Iterator<Item = OsString>) -> Result<Command, ArgsError> {
    let mut flags = Containerd::default();
    let mut action = None;
    while let Some(arg) = args.next() {
        let arg = text(arg);
        let Some(flag) = arg.strip_prefix("--").or_else(|| arg.strip_prefix('-')) else {
            action.get_or_insert(arg);
            continue;
        };
        let (name, inline) = match flag.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (flag, None),
        };
        let mut value = || {
            inline
                .clone()
                .map_or_else(|| value(&mut args, &arg).map(text), Ok)
        };
        match name {
            "id" => flags.id = value()?,
            "namespace" => flags.namespace = value()?,
            "address" => flags.address = value()?,
            "bundle" => flags.bundle = value()?,
            "publish-binary" | "socket" | "debug-socket" => drop(value()?),
            "debug" => flags.debug = inline.as_deref() != Some("false"),
            "info" => return Ok(Command::Info),
            "v" | "version" => return Ok(Command::Version),
            _ => return Err(ArgsError::Unknown(arg)),
        }
    }
    let command = match action.as_deref() {
        Some("start") => Command::Start,
        Some("delete") => Command::Delete,
        Some(other) => return Err(ArgsError::Unknown(other.to_owned())),
        None => {
            return Err(ArgsError::Missing {
                command: "containerd-shim-slipway-v1",
                option: "a command: pod, cleanup, start or delete",
            });
        }
    };
    for (value, option) in [(&flags.id, "-id"), (&flags.namespace, "-namespace")] {
        if value.is_empty() {
            return Err(ArgsError::Missing {
                command: "the shim of containerd",
                option,
            });
        }
    }
    Ok(command(flags))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse_words(words: &[&str]) -> Result<Command, ArgsError> {
        parse(words.iter().map(OsString::from))
    }

    #[test]
    fn containerds_flags_are_understood_as_go_writes_them() {
        let words = [
            "-namespace",
            "k8s.io",
            "--id=c1",
            "-address",
            "/run/c.sock",
            "-publish-binary",
            "x",
            "-debug",
        ];
        let command = parse_words(&[&words[..], &["start"]].concat()).expect("a command");
        let Command::Start(flags) = command else {
            panic!("{command:?}")
        };
        assert_eq!(
            (flags.namespace.as_str(), flags.id.as_str(), flags.debug),
            ("k8s.io", "c1", true)
        );
        assert!(matches!(
            parse_words(&["-id", "a", "-namespace", "n", "delete"]),
            Ok(Command::Delete(_))
        ));
        assert_eq!(parse_words(&["-info"]), Ok(Command::Info));
    }

    #[test]
    fn a_command_without_what_it_needs_says_so() {
        let error = parse_words(&["pod", "--id", "p"]).expect_err("no state directory");
        assert_eq!(error.to_string(), "pod needs --state-dir");
        assert!(parse_words(&[]).is_err());
        assert!(parse_words(&["-namespace", "n", "start"]).is_err());
        assert_eq!(
            parse_words(&["cleanup", "--state-dir"]),
            Err(ArgsError::NoValue("--state-dir".into()))
        );
    }
}

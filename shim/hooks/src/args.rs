//! The hooks' command lines: which of them are known, and what they ask for.
//!
//! ```text
//! nvidia-cdi-hook [--quiet] VERB [FLAGS]      nvidia-ctk hook VERB [FLAGS]      slipway-agent cdi-hook VERB [FLAGS]
//! ```
//! Flags are `--name VALUE` or `--name=VALUE`; a list is the flag repeated, or values with commas between them. A verb or
//! a flag that is not known here makes a command line that is not recognised: it is somebody else's, and run as such.

use std::path::{Path, PathBuf};

/// The verbs that are known.
pub const VERBS: [&str; 6] = [
    "create-symlinks",
    "update-ldcache",
    "enable-cuda-compat",
    "disable-device-node-modification",
    "update-application-profile",
    "chmod",
];

/// The verb of the hook that [`limits_memory`] is about.
const LIMIT_MEMORY: &str = "apply-cuda-memory-limits";

/// A hook that we do ourselves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Hook {
    /// Makes links.
    CreateSymlinks(Vec<Link>),
    /// Makes the container's loader find the libraries in these folders.
    UpdateLdcache {
        /// In the container.
        folders: Vec<String>,
        /// On the host.
        ldconfig: PathBuf,
    },
    /// Prefers the image's libcuda where it is newer than the driver's and the driver can run it.
    EnableCudaCompat(Compat),
    /// Keeps the driver's user space from making device nodes.
    DisableDeviceNodeModification,
    /// Shows EGL and Vulkan the container's GPUs only.
    UpdateApplicationProfile,
    /// Sets the mode of files, where they are.
    Chmod {
        /// The permission bits.
        mode: u32,
        /// In the container.
        paths: Vec<String>,
    },
}

/// A link to make.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// What it says.
    pub target: String,
    /// Where it is.
    pub path: String,
}

/// What is known of the driver, and where the image has its own libcuda.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Compat {
    /// The driver's version.
    pub driver: Option<String>,
    /// The newest CUDA that the driver can run.
    pub cuda: Option<String>,
    /// In the container.
    pub folder: String,
}

impl Hook {
    /// The verb that asks for it.
    pub fn verb(&self) -> &'static str {
        match self {
            Hook::CreateSymlinks(_) => VERBS[0],
            Hook::UpdateLdcache { .. } => VERBS[1],
            Hook::EnableCudaCompat(_) => VERBS[2],
            Hook::DisableDeviceNodeModification => VERBS[3],
            Hook::UpdateApplicationProfile => VERBS[4],
            Hook::Chmod { .. } => VERBS[5],
        }
    }
}

/// A command line that makes no sense.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum UsageError {
    /// There is no verb.
    #[error("which hook? One of {}", VERBS.join(", "))]
    NoVerb,
    /// It is not one of ours.
    #[error("there is no hook {verb}; there are {verbs}", verb = .0, verbs = VERBS.join(", "))]
    Verb(String),
    /// The verb does not have this flag.
    #[error("{0} has no flag {1}")]
    Flag(&'static str, String),
    /// A flag without its value.
    #[error("{0} takes a value")]
    NoValue(String),
    /// A value that cannot be.
    #[error("{flag} {value}: {reason}")]
    Value {
        /// Of which flag.
        flag: &'static str,
        /// The value.
        value: String,
        /// What is wrong with it.
        reason: &'static str,
    },
}

/// The hook, when the program and its whole command line (`args`, the zeroth included) are ones that we know.
pub fn recognise(program: &Path, args: &[String]) -> Option<Hook> {
    parse(after_the_program(program, args)?).ok()
}

/// Whether it is the hook that limits how much of a GPU's memory a container's cgroup may have: as `NVIDIA_GPU_MEMORY_REQUEST`
/// and `NVIDIA_GPU_MEMORY_LIMIT` of the container's process say, where it has both, and not at all where it has not. Only its
/// own program can do it: it asks the driver's library.
pub fn limits_memory(program: &Path, args: &[String]) -> bool {
    let Some((verb, flags)) =
        after_the_program(program, args).and_then(|a| without_verbosity(a).split_first())
    else {
        return false;
    };
    let names = ["--driver-root", "--gpu-id", "--container-spec"];
    // Elsewhere than on its standard input the container's state is somebody else's.
    let of_this_container =
        |[_, _, state]: [Vec<String>; 3]| last(state).is_none_or(|s| s.is_empty() || s == "-");
    verb == LIMIT_MEMORY && flags_of(LIMIT_MEMORY, names, flags).is_ok_and(of_this_container)
}

/// The command line from the verb's own switches on, when the program is one of those that do such hooks.
fn after_the_program<'a>(program: &Path, args: &'a [String]) -> Option<&'a [String]> {
    let name = program.file_name()?.to_str()?;
    let (_, mut rest) = args.split_first()?;
    let group = match name {
        "nvidia-cdi-hook" => None,
        "nvidia-ctk" => Some("hook"),
        "slipway-agent" => Some("cdi-hook"),
        _ => return None,
    };
    if let Some(group) = group {
        rest = without_verbosity(rest);
        let (first, others) = rest.split_first()?;
        if first != group {
            return None;
        }
        rest = others;
    }
    Some(rest)
}

/// What is said before a verb about how much to tell.
fn without_verbosity(args: &[String]) -> &[String] {
    let is_verbosity = |a: &&String| matches!(a.as_str(), "--quiet" | "--debug" | "-d");
    &args[args.iter().take_while(is_verbosity).count()..]
}

/// A verb and its flags.
///
/// # Errors
/// What is not known, or makes no sense, by name.
pub fn parse(args: &[String]) -> Result<Hook, UsageError> {
    let (verb, flags) = without_verbosity(args).split_first().ok_or(UsageError::NoVerb)?;
    match verb.as_str() {
        "create-symlinks" => {
            let [links] = flags_of(VERBS[0], ["--link"], flags)?;
            links
                .iter()
                .flat_map(|l| l.split(','))
                .map(link)
                .collect::<Result<_, _>>()
                .map(Hook::CreateSymlinks)
        }
        "update-ldcache" => {
            let [folders, ldconfig] = flags_of(VERBS[1], ["--folder", "--ldconfig-path"], flags)?;
            let ldconfig = last(ldconfig).unwrap_or_else(|| "/sbin/ldconfig".to_owned());
            // "@" says: the host's. It always is.
            let ldconfig = PathBuf::from(ldconfig.strip_prefix('@').unwrap_or(&ldconfig));
            if !ldconfig.is_absolute() {
                return Err(bad(
                    "--ldconfig-path",
                    &ldconfig.display().to_string(),
                    "is not absolute",
                ));
            }
            let folders = split(&folders);
            check(&folders, "--folder")?;
            Ok(Hook::UpdateLdcache { folders, ldconfig })
        }
        "enable-cuda-compat" => {
            let names = [
                "--host-driver-version",
                "--host-cuda-version",
                "--cuda-compat-container-root",
            ];
            let [driver, cuda, folder] = flags_of(VERBS[2], names, flags)?;
            let folder = last(folder).unwrap_or_else(|| "/usr/local/cuda/compat".to_owned());
            check(std::slice::from_ref(&folder), names[2])?;
            let given = |list| last(list).filter(|v| !v.is_empty());
            Ok(Hook::EnableCudaCompat(Compat {
                driver: given(driver),
                cuda: given(cuda),
                folder,
            }))
        }
        "disable-device-node-modification" => {
            flags_of(VERBS[3], [], flags).map(|[]| Hook::DisableDeviceNodeModification)
        }
        "update-application-profile" => {
            flags_of(VERBS[4], [], flags).map(|[]| Hook::UpdateApplicationProfile)
        }
        "chmod" => {
            let [mode, paths] = flags_of(VERBS[5], ["--mode", "--path"], flags)?;
            let text = last(mode).unwrap_or_default();
            let mode = u32::from_str_radix(&text, 8).ok().filter(|m| *m <= 0o7777);
            let mode = mode.ok_or_else(|| bad("--mode", &text, "is no octal mode"))?;
            let paths = split(&paths);
            check(&paths, "--path")?;
            Ok(Hook::Chmod { mode, paths })
        }
        other => Err(UsageError::Verb(other.to_owned())),
    }
}

/// The values of each of the flags, in order.
fn flags_of<const N: usize>(
    verb: &'static str,
    names: [&'static str; N],
    args: &[String],
) -> Result<[Vec<String>; N], UsageError> {
    let mut values = [const { Vec::new() }; N];
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        let (name, value) = match arg.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (arg.as_str(), None),
        };
        let Some(n) = names.iter().position(|known| *known == name) else {
            return Err(UsageError::Flag(verb, arg.clone()));
        };
        let value = value.or_else(|| args.next().cloned());
        values[n].push(value.ok_or_else(|| UsageError::NoValue(name.to_owned()))?);
    }
    Ok(values)
}

fn last(mut values: Vec<String>) -> Option<String> {
    values.pop()
}

fn split(values: &[String]) -> Vec<String> {
    let all = values.iter().flat_map(|v| v.split(','));
    all.filter(|v| !v.is_empty()).map(str::to_owned).collect()
}

fn link(text: &str) -> Result<Link, UsageError> {
    let reason = match text.split_once("::") {
        Some((target, path)) if !path.contains("::") => {
            if target.is_empty() {
                "has no target"
            } else if !path.starts_with('/') || path.ends_with('/') {
                "the link is no absolute path"
            } else if has_control(text) {
                "has a control character"
            } else {
                return Ok(Link {
                    target: target.to_owned(),
                    path: path.to_owned(),
                });
            }
        }
        _ => "is not TARGET::LINK",
    };
    Err(bad("--link", text, reason))
}

/// Each of them becomes a line of a file, or a path.
fn check(paths: &[String], flag: &'static str) -> Result<(), UsageError> {
    for path in paths {
        if !path.starts_with('/') {
            return Err(bad(flag, path, "is not absolute"));
        }
        if has_control(path) {
            return Err(bad(flag, path, "has a control character"));
        }
    }
    Ok(())
}

fn has_control(text: &str) -> bool {
    text.chars().any(char::is_control)
}

fn bad(flag: &'static str, value: &str, reason: &'static str) -> UsageError {
    UsageError::Value {
        flag,
        value: value.to_owned(),
        reason,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(text: &str) -> Vec<String> {
        text.split_whitespace().map(str::to_owned).collect()
    }

    fn known(program: &str, args: &str) -> Option<Hook> {
        recognise(Path::new(program), &line(args))
    }

    #[test]
    fn three_programs_are_known_by_the_same_verbs() {
        let wanted = Some(Hook::CreateSymlinks(vec![Link {
            target: "libcuda.so.1".into(),
            path: "/usr/lib64/libcuda.so".into(),
        }]));
        for (program, args) in [
            (
                "/usr/bin/nvidia-cdi-hook",
                "nvidia-cdi-hook create-symlinks --link L",
            ),
            ("/usr/bin/nvidia-cdi-hook", "x --quiet create-symlinks --link=L"),
            (
                "/usr/local/bin/nvidia-ctk",
                "nvidia-ctk hook create-symlinks --link L",
            ),
            (
                "/opt/nvidia-ctk",
                "nvidia-ctk --debug hook create-symlinks --link L",
            ),
            (
                "/a/slipway-agent",
                "slipway-agent cdi-hook create-symlinks --link L",
            ),
        ] {
            let args = args.replace('L', "libcuda.so.1::/usr/lib64/libcuda.so");
            assert_eq!(known(program, &args), wanted, "{args}");
        }
    }

    #[test]
    fn whatever_is_not_known_whole_is_not_recognised() {
        for (program, args) in [
            ("/usr/bin/nvidia-cdi-hooks", "nvidia-cdi-hook create-symlinks"),
            ("/usr/bin/nvidia-cdi-hook", "nvidia-cdi-hook"),
            ("/usr/bin/nvidia-cdi-hook", "nvidia-cdi-hook hook create-symlinks"),
            ("/usr/bin/nvidia-cdi-hook", "nvidia-cdi-hook make-coffee"),
            (
                "/usr/bin/nvidia-cdi-hook",
                "nvidia-cdi-hook create-symlinks --new a::/b",
            ),
            (
                "/usr/bin/nvidia-cdi-hook",
                "nvidia-cdi-hook create-symlinks --link",
            ),
            (
                "/usr/bin/nvidia-cdi-hook",
                "nvidia-cdi-hook create-symlinks --link a::b",
            ),
            (
                "/usr/bin/nvidia-cdi-hook",
                "nvidia-cdi-hook create-symlinks --link a::/b::/c",
            ),
            (
                "/usr/bin/nvidia-cdi-hook",
                "nvidia-cdi-hook update-ldcache --folder lib",
            ),
            (
                "/usr/bin/nvidia-cdi-hook",
                "nvidia-cdi-hook update-ldcache --ldconfig-path sbin/ldconfig",
            ),
            (
                "/usr/bin/nvidia-cdi-hook",
                "nvidia-cdi-hook chmod --mode rwx --path /dev",
            ),
            ("/usr/bin/nvidia-ctk", "nvidia-ctk create-symlinks --link a::/b"),
            ("/usr/bin/nvidia-ctk", "nvidia-ctk runtime configure"),
            ("/usr/bin/slipway-agent", "slipway-agent run"),
        ] {
            assert_eq!(known(program, args), None, "{args}");
        }
        assert_eq!(recognise(Path::new("/usr/bin/nvidia-cdi-hook"), &[]), None);
    }

    #[test]
    fn the_limit_of_memory_is_known_by_its_whole_command_line() {
        let limits = |program: &str, args: &str| limits_memory(Path::new(program), &line(args));
        let flags = "apply-cuda-memory-limits --driver-root / --gpu-id GPU-1 --gpu-id=GPU-2";
        for (program, args) in [
            ("/usr/bin/nvidia-cdi-hook", format!("nvidia-cdi-hook {flags}")),
            ("/usr/bin/nvidia-ctk", format!("nvidia-ctk --debug hook {flags}")),
            (
                "/usr/bin/nvidia-ctk",
                format!("nvidia-ctk hook {flags} --container-spec -"),
            ),
        ] {
            assert!(limits(program, &args), "{args}");
            assert_eq!(known(program, &args), None, "we do not do it");
        }
        for (program, args) in [
            ("/usr/bin/nvidia-ctk", format!("nvidia-ctk {flags}")),
            ("/usr/bin/other", format!("other {flags}")),
            (
                "/usr/bin/nvidia-cdi-hook",
                format!("x {flags} --container-spec /state.json"),
            ),
            ("/usr/bin/nvidia-cdi-hook", format!("x {flags} --new 1")),
            (
                "/usr/bin/nvidia-cdi-hook",
                "x chmod --mode 755 --path /a".to_owned(),
            ),
        ] {
            assert!(!limits(program, &args), "{args}");
        }
    }

    #[test]
    fn flags_take_lists_and_have_defaults() {
        let hook = parse(&line("update-ldcache --folder /a,/b --folder /c")).expect("known");
        assert_eq!(
            hook,
            Hook::UpdateLdcache {
                folders: line("/a /b /c"),
                ldconfig: "/sbin/ldconfig".into()
            }
        );
        let hook = parse(&line("update-ldcache --ldconfig-path=@/usr/sbin/ldconfig")).expect("known");
        assert!(
            matches!(hook, Hook::UpdateLdcache { ldconfig, .. } if ldconfig == Path::new("/usr/sbin/ldconfig"))
        );
        let hook = parse(&line(
            "enable-cuda-compat --host-driver-version=570.1 --host-cuda-version=",
        ));
        let wanted = Compat {
            driver: Some("570.1".into()),
            cuda: None,
            folder: "/usr/local/cuda/compat".into(),
        };
        assert_eq!(hook, Ok(Hook::EnableCudaCompat(wanted)));
        let hook = parse(&line("chmod --mode 755 --path /dev/dri")).expect("known");
        assert_eq!(hook.verb(), "chmod");
        for verb in ["disable-device-node-modification", "update-application-profile"] {
            assert_eq!(parse(&[verb.to_owned()]).map(|h| h.verb()), Ok(verb));
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        let said = |text: &str| parse(&line(text)).expect_err("wrong").to_string();
        assert!(said("make-coffee").starts_with("there is no hook make-coffee; there are create-symlinks,"));
        assert_eq!(said("create-symlinks --link a"), "--link a: is not TARGET::LINK");
        assert_eq!(
            said("update-ldcache --speed 3"),
            "update-ldcache has no flag --speed"
        );
    }
}

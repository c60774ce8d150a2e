//! The process: what runs, with which environment, where, and as whom.

use std::collections::HashMap;
use std::path::PathBuf;

use oci_spec::runtime as oci;

use crate::capability::ProcessCapabilities;
use crate::error::SpecError;
use crate::input::SpecInput;
use crate::path;
use crate::user::{self, ResolvedUser, UserError};

const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Resolves the request's and the image's user against the image's files.
pub(crate) fn user(input: &SpecInput) -> Result<ResolvedUser, UserError> {
    let mut wanted = input.user.clone();
    if wanted.image_user.is_empty() {
        wanted.image_user.clone_from(&input.image.user);
    }
    user::resolve(&wanted, &input.passwd, &input.group)
}

pub(crate) fn process(
    input: &SpecInput,
    user: &ResolvedUser,
    capabilities: &ProcessCapabilities,
    warnings: &mut Vec<String>,
) -> Result<oci::Process, SpecError> {
    let mut p = oci::Process::default();
    p.set_terminal(input.tty.then_some(true));
    p.set_console_size(input.console_size.filter(|_| input.tty).map(|(width, height)| {
        oci::BoxBuilder::default()
            .width(width)
            .height(height)
            .build()
            .expect("both fields are set")
    }));
    let mut who = oci::User::default();
    who.set_uid(user.uid);
    who.set_gid(user.gid);
    who.set_additional_gids(Some(user.additional_gids.clone()));
    p.set_user(who);
    p.set_args(Some(args(input)?));
    p.set_env(Some(env(input, user)?));
    p.set_cwd(cwd(input)?);
    p.set_capabilities(Some(oci_capabilities(capabilities)));
    // `noNewPrivileges: false` written out makes libcontainer fail with seccomp and a non-root user.
    p.set_no_new_privileges(input.no_new_privs.then_some(true));
    p.set_rlimits(rlimits(input, warnings)?);
    p.set_oom_score_adj(oom_score_adj(input, warnings)?);
    p.set_selinux_label(
        input
            .selinux
            .as_ref()
            .filter(|_| input.host.selinux)
            .map(|l| l.process.clone()),
    );
    Ok(p)
}

/// The OCI image specification's conversion: a command replaces the entrypoint and drops the
/// image's cmd, arguments replace the cmd.
fn args(input: &SpecInput) -> Result<Vec<String>, SpecError> {
    let image = &input.image;
    let (entrypoint, cmd) = match (input.command.is_empty(), input.args.is_empty()) {
        (false, _) => (&input.command, &input.args),
        (true, false) => (&image.entrypoint, &input.args),
        (true, true) => (&image.entrypoint, &image.cmd),
    };
    let args: Vec<String> = entrypoint.iter().chain(cmd).cloned().collect();
    match args.first() {
        None => Err(SpecError::NoCommand),
        Some(first) if first.is_empty() => Err(SpecError::NoCommand),
        Some(_) => match args.iter().find(|a| a.contains('\0')) {
            Some(bad) => Err(SpecError::invalid("command", bad.as_str(), "has a NUL character")),
            None => Ok(args),
        },
    }
}

/// Defaults, the image's, the container's; of the same name the last value stays, in the place of
/// the first. HOME comes from passwd when nobody set it.
fn env(input: &SpecInput, user: &ResolvedUser) -> Result<Vec<String>, SpecError> {
    let mut env = Env::default();
    env.set("PATH", DEFAULT_PATH)?;
    if let Some(hostname) = input
        .hostname
        .as_deref()
        .filter(|h| !h.is_empty() && !input.omit_hostname_env)
    {
        env.set("HOSTNAME", hostname)?;
    }
    if input.tty {
        env.set("TERM", "xterm")?;
    }
    for entry in &input.image.env {
        // A bare NAME in an image (Docker's way to unset) has no value to give.
        let Some((name, value)) = entry.split_once('=') else {
            continue;
        };
        env.set(name, value)?;
    }
    for (name, value) in &input.envs {
        env.set(name, value)?;
    }
    if !env.places.contains_key("HOME") {
        env.set("HOME", &user.home)?;
    }
    Ok(env.entries)
}

#[derive(Default)]
struct Env {
    entries: Vec<String>,
    places: HashMap<String, usize>,
}

impl Env {
    fn set(&mut self, name: &str, value: &str) -> Result<(), SpecError> {
        if name.is_empty() || name.contains(['=', '\0']) {
            return Err(SpecError::invalid("envs", name, "is not the name of a variable"));
        }
        if value.contains('\0') {
            return Err(SpecError::invalid(
                "envs",
                name,
                "has a value with a NUL character",
            ));
        }
        let entry = format!("{name}={value}");
        match self.places.get(name) {
            Some(at) => self.entries[*at] = entry,
            None => {
                self.places.insert(name.to_owned(), self.entries.len());
                self.entries.push(entry);
            }
        }
        Ok(())
    }
}

/// The working directory. Descriptors under /proc are no place to be: through an inherited one a
/// process leaves its root (CVE-2024-21626).
fn cwd(input: &SpecInput) -> Result<PathBuf, SpecError> {
    let asked = [input.working_dir.as_str(), input.image.working_dir.as_str(), "/"];
    let asked = asked.into_iter().find(|d| !d.is_empty()).unwrap_or("/");
    let clean = path::clean_absolute("working_dir", asked)?;
    let mut parts = clean.split('/').skip(1);
    let of_a_process = match (parts.next(), parts.next()) {
        (Some("proc"), Some(who)) => {
            who == "self" || who == "thread-self" || who.starts_with(|c: char| c.is_ascii_digit())
        }
        (Some("dev"), Some("fd")) => true,
        _ => false,
    };
    if of_a_process {
        return Err(SpecError::invalid(
            "working_dir",
            asked,
            "leads through a process's descriptors",
        ));
    }
    Ok(PathBuf::from(clean))
}

fn oci_capabilities(got: &ProcessCapabilities) -> oci::LinuxCapabilities {
    let held = oci_set(&got.held);
    let ambient = oci_set(&got.ambient);
    let mut sets = oci::LinuxCapabilities::default();
    sets.set_bounding(Some(held.clone()));
    sets.set_permitted(Some(held.clone()));
    sets.set_effective(Some(held));
    sets.set_inheritable(Some(ambient.clone()));
    sets.set_ambient(Some(ambient));
    sets
}

/// oci-spec's enum has no conversion from `CAP_…` but its strum names.
fn oci_set(names: &crate::CapabilitySet) -> oci::Capabilities {
    names
        .iter()
        .filter_map(|n| n.strip_prefix("CAP_")?.parse().ok())
        .collect()
}

fn rlimits(
    input: &SpecInput,
    warnings: &mut Vec<String>,
) -> Result<Option<Vec<oci::PosixRlimit>>, SpecError> {
    let mut limits: Vec<oci::PosixRlimit> = Vec::new();
    for wish in &input.rlimits {
        let upper = wish.name.to_ascii_uppercase();
        let name = if upper.starts_with("RLIMIT_") {
            upper
        } else {
            format!("RLIMIT_{upper}")
        };
        let typ: oci::PosixRlimitType = name
            .parse()
            .map_err(|_| SpecError::invalid("rlimits", wish.name.as_str(), "is not a limit"))?;
        if wish.soft > wish.hard {
            return Err(SpecError::invalid(
                "rlimits",
                wish.name.as_str(),
                "has a soft limit above the hard one",
            ));
        }
        let (mut soft, mut hard) = (wish.soft, wish.hard);
        if !input.host.has("CAP_SYS_RESOURCE")
            && let Some(own) = input.host.rlimits.get(&name)
            && hard > *own
        {
            warnings.push(format!(
                "{name}: {hard} cannot be had without CAP_SYS_RESOURCE, {own} is used"
            ));
            (soft, hard) = (soft.min(*own), *own);
        }
        let limit = oci::PosixRlimitBuilder::default().typ(typ).soft(soft).hard(hard);
        let limit = limit.build().expect("all fields are set");
        limits.retain(|l| l.typ() != typ);
        limits.push(limit);
    }
    Ok((!limits.is_empty()).then_some(limits))
}

/// Lowering it below this process's own needs CAP_SYS_RESOURCE: clamped, and told.
fn oom_score_adj(input: &SpecInput, warnings: &mut Vec<String>) -> Result<Option<i32>, SpecError> {
    let Some(wish) = input.oom_score_adj else {
        return Ok(None);
    };
    let wish = i32::try_from(wish)
        .ok()
        .filter(|n| (-1000..=1000).contains(n))
        .ok_or_else(|| SpecError::invalid("oom_score_adj", wish.to_string(), "is outside -1000..=1000"))?;
    let own = input.host.oom_score_adj;
    if wish < own && !input.host.has("CAP_SYS_RESOURCE") {
        warnings.push(format!(
            "oom_score_adj {wish} cannot be had without CAP_SYS_RESOURCE, {own} is used"
        ));
        return Ok(Some(own));
    }
    Ok(Some(wish))
}

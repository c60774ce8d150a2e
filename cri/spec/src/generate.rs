//! The order in which a specification is made, and the part of it that is Linux's.

use std::collections::HashMap;
use std::path::PathBuf;

use oci_spec::runtime as oci;

use crate::capability::{self, ProcessCapabilities};
use crate::error::SpecError;
use crate::input::{Apparmor, Namespace, SpecInput};
use crate::signal::{self, Signal};
use crate::user::ResolvedUser;
use crate::{annotations, devices, masks, mounts, namespaces, process, resources, seccomp, sysctl};

/// The version of the runtime specification that is written.
const OCI_VERSION: &str = "1.2.0";

/// A container's specification and what the caller needs to know beside it.
#[derive(Debug, Clone)]
pub struct SpecOutput {
    /// The specification.
    pub spec: oci::Spec,
    /// Who the process is.
    pub user: ResolvedUser,
    /// Wishes that were granted only in part (clamped limits, missing capabilities), for the log.
    pub warnings: Vec<String>,
    /// What stops the container: `SIGTERM`, `SIGRTMIN+3`.
    pub stop_signal: String,
    /// The same as a number.
    pub stop_signal_number: u32,
    /// Volumes of the image that no mount of the input covers: the container sees the image's own
    /// directories there unless the caller mounts something. See [`crate::volumes`].
    pub volumes: Vec<PathBuf>,
}

impl SpecOutput {
    /// The specification as config.json, the same bytes for the same input.
    pub fn to_json(&self) -> Vec<u8> {
        crate::json::stable(&self.spec)
    }
}

/// Makes the OCI runtime specification of a container.
///
/// # Errors
/// A wish that is malformed, dangerous, or more than the host has; the error names its field.
pub fn generate(input: &SpecInput) -> Result<SpecOutput, SpecError> {
    let mut warnings = Vec::new();
    let user = process::user(input)?;
    let stop = stop_signal(input, &mut warnings)?;
    let capabilities = capabilities(input, &mut warnings)?;
    let (mounts, propagation) = mounts::mounts(input)?;
    let volumes = mounts::volumes(&input.image, &input.mounts)?;

    let mut spec = oci::Spec::default();
    spec.set_version(OCI_VERSION.to_owned());
    spec.set_root(Some(root(input)));
    spec.set_hostname(hostname(input)?);
    spec.set_mounts(Some(mounts));
    let mut process = process::process(input, &user, &capabilities, &mut warnings)?;
    process.set_apparmor_profile(apparmor(input, &mut warnings)?);
    spec.set_process(Some(process));
    spec.set_linux(Some(linux(input, &capabilities, propagation, &mut warnings)?));
    let annotations = annotations::annotations(input, &mut warnings)?;
    spec.set_annotations((!annotations.is_empty()).then_some(annotations));
    // Last, since an edit replaces what the container or its image says.
    for edits in &input.cdi {
        edits.apply(&mut spec)?;
    }
    check_hooks(&spec)?;
    Ok(SpecOutput {
        spec,
        user,
        warnings,
        stop_signal: stop.name,
        stop_signal_number: stop.number,
        volumes,
    })
}

/// What would never be run is refused, so that no hook is skipped unseen.
fn check_hooks(spec: &oci::Spec) -> Result<(), SpecError> {
    let hooks = spec.hooks().as_ref();
    for (moment, list) in [
        ("poststart", hooks.and_then(|h| h.poststart().as_ref())),
        ("poststop", hooks.and_then(|h| h.poststop().as_ref())),
    ] {
        if let Some(first) = list.into_iter().flatten().next() {
            return Err(SpecError::Unsupported {
                field: "hooks",
                value: format!("{moment} {}", first.path().display()),
                reason: "hooks of that moment are not run",
            });
        }
    }
    Ok(())
}

fn linux(
    input: &SpecInput,
    capabilities: &ProcessCapabilities,
    propagation: Option<String>,
    warnings: &mut Vec<String>,
) -> Result<oci::Linux, SpecError> {
    let (list, maps) = namespaces::namespaces(input)?;
    let (nodes, rules) = devices::devices(input)?;
    let mut limits = resources::to_oci(&input.resources)?;
    limits.set_devices(Some(rules));
    limits.set_block_io(input.block_io.as_ref().map(crate::blockio::to_oci));
    let sysctls: HashMap<_, _> = sysctl::of_container(input)?.into_iter().collect();

    // Every field is set: the type's own defaults are another runtime's taste.
    let mut linux = oci::Linux::default();
    let (uids, gids) = maps.unzip();
    linux.set_uid_mappings(uids);
    linux.set_gid_mappings(gids);
    linux.set_sysctl((!sysctls.is_empty()).then_some(sysctls));
    linux.set_resources(Some(limits));
    linux.set_cgroups_path((!input.cgroups_path.is_empty()).then(|| PathBuf::from(&input.cgroups_path)));
    linux.set_namespaces(Some(list));
    linux.set_devices((!nodes.is_empty()).then_some(nodes));
    linux.set_seccomp(seccomp::seccomp(input, &capabilities.held, warnings)?);
    linux.set_rootfs_propagation(propagation);
    linux.set_masked_paths(Some(masks::masked(input)));
    linux.set_readonly_paths(Some(masks::readonly(input)));
    linux.set_mount_label(
        input
            .selinux
            .as_ref()
            .filter(|_| input.host.selinux)
            .map(|l| l.mount.clone()),
    );
    linux.set_intel_rdt(None);
    linux.set_net_devices(None);
    Ok(linux)
}

fn root(input: &SpecInput) -> oci::Root {
    let path = if input.rootfs.as_os_str().is_empty() {
        PathBuf::from("rootfs")
    } else {
        input.rootfs.clone()
    };
    let mut root = oci::Root::default();
    root.set_path(path);
    root.set_readonly(Some(input.readonly_rootfs));
    root
}

/// Set only in a UTS namespace that is new: in the pod's, its maker has set it.
fn hostname(input: &SpecInput) -> Result<Option<String>, SpecError> {
    let name = input.hostname.as_deref().filter(|h| !h.is_empty());
    if let Some(name) = name
        && (name.len() > 64
            || name
                .chars()
                .any(|c| c.is_control() || c.is_whitespace() || c == '/'))
    {
        return Err(SpecError::invalid(
            "hostname",
            name,
            "is not a host name of at most 64 characters",
        ));
    }
    Ok(name
        .filter(|_| input.namespaces.uts == Namespace::New)
        .map(str::to_owned))
}

fn capabilities(input: &SpecInput, warnings: &mut Vec<String>) -> Result<ProcessCapabilities, SpecError> {
    let defaults = input.default_capabilities.as_deref();
    let got = capability::resolve(&input.capabilities, defaults, input.privileged, &input.host)?;
    if !got.missing.is_empty() {
        warnings.push(format!(
            "capabilities {} are not this process's to give",
            got.missing.join(", ")
        ));
    }
    Ok(got)
}

/// Never an empty field: where AppArmor is off it is an error to name a profile.
fn apparmor(input: &SpecInput, warnings: &mut Vec<String>) -> Result<Option<String>, SpecError> {
    if input.privileged {
        return Ok(None);
    }
    match &input.apparmor {
        Apparmor::Unconfined => Ok(None),
        Apparmor::RuntimeDefault => {
            let profile = input
                .host
                .apparmor_default
                .clone()
                .filter(|_| input.host.apparmor);
            if input.host.apparmor && profile.is_none() {
                warnings
                    .push("no default AppArmor profile is loaded: the container runs without one".to_owned());
            }
            Ok(profile)
        }
        Apparmor::Localhost(name) if !input.host.apparmor => Err(SpecError::Unsupported {
            field: "apparmor",
            value: name.clone(),
            reason: "AppArmor is not enabled",
        }),
        Apparmor::Localhost(name) if name.is_empty() || name.chars().any(char::is_control) => Err(
            SpecError::invalid("apparmor", name.as_str(), "is not the name of a profile"),
        ),
        Apparmor::Localhost(name) => Ok(Some(name.clone())),
    }
}

/// The request's, else the image's, else SIGTERM. A bad one in the image must not keep it from
/// running.
fn stop_signal(input: &SpecInput, warnings: &mut Vec<String>) -> Result<Signal, SpecError> {
    if let Some(asked) = input.stop_signal.as_deref().filter(|s| !s.is_empty()) {
        return signal::parse(asked)
            .ok_or_else(|| SpecError::invalid("stop_signal", asked, "is not a signal"));
    }
    let image = input.image.stop_signal.as_str();
    if image.is_empty() {
        return Ok(Signal::term());
    }
    Ok(signal::parse(image).unwrap_or_else(|| {
        warnings.push(format!(
            "the image's STOPSIGNAL {image:?} is not a signal: SIGTERM is used"
        ));
        Signal::term()
    }))
}

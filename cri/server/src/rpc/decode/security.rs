//! Namespaces, identity, profiles.

use slipway_cri_api::v1;
use slipway_spec::{CapabilityRequest, IdMap, SupplementalGroupsPolicy};

use super::{Invalid, id, invalid, name, optional_absolute, shown, unknown_enum};
use crate::model::{Apparmor, PidNamespace, Scope, Seccomp, Security, UserNamespace};

/// POD, CONTAINER or NODE; TARGET means something for a container's processes only.
pub(super) fn scope(field: &'static str, mode: i32) -> Result<Scope, Invalid> {
    match v1::NamespaceMode::try_from(mode) {
        Ok(v1::NamespaceMode::Pod) => Ok(Scope::Pod),
        Ok(v1::NamespaceMode::Container) => Ok(Scope::Container),
        Ok(v1::NamespaceMode::Node) => Ok(Scope::Node),
        Ok(v1::NamespaceMode::Target) => {
            Err(invalid(field, "TARGET is only for a container's PID namespace"))
        }
        Err(_) => Err(unknown_enum(field, mode)),
    }
}

pub(super) fn user_namespace(options: Option<v1::UserNamespace>) -> Result<Option<UserNamespace>, Invalid> {
    const FIELD: &str = "namespace_options.userns_options";
    let Some(options) = options else { return Ok(None) };
    match v1::NamespaceMode::try_from(options.mode) {
        Ok(v1::NamespaceMode::Node) => {
            if options.uids.is_empty() && options.gids.is_empty() {
                Ok(None)
            } else {
                Err(invalid(FIELD, "the node's user namespace takes no mappings"))
            }
        }
        Ok(v1::NamespaceMode::Pod) => {
            if options.uids.len() != 1 || options.gids.len() != 1 {
                return Err(invalid(
                    FIELD,
                    "a pod's user namespace takes exactly one uid and one gid mapping",
                ));
            }
            for map in options.uids.iter().chain(&options.gids) {
                let last = |first: u32| map.length.checked_sub(1).and_then(|more| first.checked_add(more));
                if last(map.container_id).is_none() || last(map.host_id).is_none() {
                    return Err(invalid(
                        FIELD,
                        format!(
                            "{}:{}:{} is no range of ids",
                            map.container_id, map.host_id, map.length
                        ),
                    ));
                }
            }
            Ok(Some(UserNamespace {
                uids: id_maps(&options.uids),
                gids: id_maps(&options.gids),
            }))
        }
        Ok(_) => Err(invalid(FIELD, "a user namespace is the pod's or the node's")),
        Err(_) => Err(unknown_enum(FIELD, options.mode)),
    }
}

pub(super) fn id_maps(maps: &[v1::IdMapping]) -> Vec<IdMap> {
    maps.iter()
        .map(|m| IdMap {
            container: m.container_id,
            host: m.host_id,
            length: m.length,
        })
        .collect()
}

/// What is said of a pod's own process, which is ours and confined the same in every pod: its namespaces and whether the pod
/// may have privileged containers are used, the rest is checked. A `run_as_group` without a user is let through, for kubelet
/// sends what the pod's specification has; it sends containers theirs complete.
pub(super) fn pod_security(
    context: v1::LinuxSandboxSecurityContext,
) -> Result<v1::LinuxSandboxSecurityContext, Invalid> {
    #[allow(deprecated)]
    let old_seccomp = &context.seccomp_profile_path;
    seccomp(context.seccomp.clone(), old_seccomp)?;
    apparmor(context.apparmor.clone(), "")?;
    selinux(context.selinux_options.clone())?;
    groups_policy(context.supplemental_groups_policy)?;
    let ids = |field, ids: &[i64]| match ids.iter().find(|id| !(0..=i64::from(i32::MAX)).contains(*id)) {
        Some(id) => Err(invalid(field, format!("{id} is outside 0..=2147483647"))),
        None => Ok(()),
    };
    let one = |id: &Option<v1::Int64Value>| id.as_ref().map(|v| v.value);
    ids(
        "security_context.run_as_user",
        one(&context.run_as_user).as_slice(),
    )?;
    ids(
        "security_context.run_as_group",
        one(&context.run_as_group).as_slice(),
    )?;
    ids(
        "security_context.supplemental_groups",
        &context.supplemental_groups,
    )?;
    Ok(context)
}

pub(super) fn security(context: v1::LinuxContainerSecurityContext) -> Result<Security, Invalid> {
    let namespaces = context.namespace_options.unwrap_or_default();
    if user_namespace(namespaces.userns_options.clone())?.is_some_and(|u| u.uids.is_empty()) {
        return Err(invalid("namespace_options.userns_options", "an empty mapping"));
    }
    #[allow(deprecated)]
    let (old_seccomp, old_apparmor) = (context.seccomp_profile_path, context.apparmor_profile);
    let capabilities = context.capabilities.unwrap_or_default();
    Ok(Security {
        capabilities: CapabilityRequest {
            add: capabilities.add_capabilities,
            drop: capabilities.drop_capabilities,
            ambient: capabilities.add_ambient_capabilities,
        },
        privileged: context.privileged,
        network: scope("namespace_options.network", namespaces.network)?,
        pid: pid_namespace(&namespaces)?,
        ipc: scope("namespace_options.ipc", namespaces.ipc)?,
        selinux: selinux(context.selinux_options)?,
        run_as_user: context.run_as_user.map(|v| v.value),
        run_as_group: context.run_as_group.map(|v| v.value),
        run_as_username: Some(name("security_context.run_as_username", context.run_as_username)?)
            .filter(|name| !name.is_empty()),
        supplemental_groups: context.supplemental_groups,
        supplemental_groups_policy: groups_policy(context.supplemental_groups_policy)?,
        readonly_rootfs: context.readonly_rootfs,
        no_new_privs: context.no_new_privs,
        masked_paths: paths("security_context.masked_paths", context.masked_paths)?,
        readonly_paths: paths("security_context.readonly_paths", context.readonly_paths)?,
        seccomp: seccomp(context.seccomp, &old_seccomp)?,
        apparmor: apparmor(context.apparmor, &old_apparmor)?,
    })
}

fn groups_policy(policy: i32) -> Result<SupplementalGroupsPolicy, Invalid> {
    match v1::SupplementalGroupsPolicy::try_from(policy) {
        Ok(v1::SupplementalGroupsPolicy::Merge) => Ok(SupplementalGroupsPolicy::Merge),
        Ok(v1::SupplementalGroupsPolicy::Strict) => Ok(SupplementalGroupsPolicy::Strict),
        Err(_) => Err(unknown_enum("supplemental_groups_policy", policy)),
    }
}

/// Paths in the container that are covered or made read-only.
fn paths(field: &'static str, paths: Vec<String>) -> Result<Vec<String>, Invalid> {
    for path in &paths {
        if optional_absolute(field, path)?.is_none() || path.chars().any(char::is_control) {
            return Err(invalid(field, format!("{} is no path", shown(path))));
        }
    }
    Ok(paths)
}

fn pid_namespace(options: &v1::NamespaceOption) -> Result<PidNamespace, Invalid> {
    const FIELD: &str = "namespace_options.pid";
    match v1::NamespaceMode::try_from(options.pid) {
        Ok(v1::NamespaceMode::Pod) => Ok(PidNamespace::Pod),
        Ok(v1::NamespaceMode::Container) => Ok(PidNamespace::Container),
        Ok(v1::NamespaceMode::Node) => Ok(PidNamespace::Node),
        Ok(v1::NamespaceMode::Target) if options.target_id.is_empty() => {
            Err(invalid(FIELD, "TARGET without a target_id"))
        }
        Ok(v1::NamespaceMode::Target) => Ok(PidNamespace::Target(id(
            "namespace_options.target_id",
            options.target_id.clone(),
        )?)),
        Err(_) => Err(unknown_enum(FIELD, options.pid)),
    }
}

fn selinux(options: Option<v1::SeLinuxOption>) -> Result<Option<String>, Invalid> {
    let Some(o) = options else { return Ok(None) };
    for part in [&o.user, &o.role, &o.r#type, &o.level] {
        name("security_context.selinux_options", part.clone())?;
    }
    let all_empty = [&o.user, &o.role, &o.r#type, &o.level]
        .iter()
        .all(|s| s.is_empty());
    Ok((!all_empty).then(|| format!("{}:{}:{}:{}", o.user, o.role, o.r#type, o.level)))
}

fn seccomp(profile: Option<v1::SecurityProfile>, old: &str) -> Result<Seccomp, Invalid> {
    const FIELD: &str = "security_context.seccomp";
    let Some(profile) = profile else {
        return match old {
            "" | "unconfined" => Ok(Seccomp::Unconfined),
            "runtime/default" | "docker/default" => Ok(Seccomp::RuntimeDefault),
            other => seccomp_file(FIELD, other),
        };
    };
    match v1::security_profile::ProfileType::try_from(profile.profile_type) {
        Ok(v1::security_profile::ProfileType::RuntimeDefault) => Ok(Seccomp::RuntimeDefault),
        Ok(v1::security_profile::ProfileType::Unconfined) => Ok(Seccomp::Unconfined),
        Ok(v1::security_profile::ProfileType::Localhost) => seccomp_file(FIELD, &profile.localhost_ref),
        Err(_) => Err(unknown_enum(FIELD, profile.profile_type)),
    }
}

/// The kubelet sends an absolute path, older callers "localhost/" before it.
fn seccomp_file(field: &'static str, localhost_ref: &str) -> Result<Seccomp, Invalid> {
    let text = localhost_ref.strip_prefix("localhost/").unwrap_or(localhost_ref);
    let path =
        optional_absolute(field, text)?.ok_or_else(|| invalid(field, "Localhost without a localhost_ref"))?;
    Ok(Seccomp::Localhost(path))
}

fn apparmor(profile: Option<v1::SecurityProfile>, old: &str) -> Result<Apparmor, Invalid> {
    const FIELD: &str = "security_context.apparmor";
    let local = |reference: &str| match reference.strip_prefix("localhost/").unwrap_or(reference) {
        "" => Err(invalid(FIELD, "Localhost without a localhost_ref")),
        profile => Ok(Apparmor::Localhost(name(FIELD, profile.to_owned())?)),
    };
    let Some(profile) = profile else {
        return match old {
            "" | "runtime/default" => Ok(Apparmor::RuntimeDefault),
            "unconfined" => Ok(Apparmor::Unconfined),
            other => local(other),
        };
    };
    match v1::security_profile::ProfileType::try_from(profile.profile_type) {
        Ok(v1::security_profile::ProfileType::RuntimeDefault) => Ok(Apparmor::RuntimeDefault),
        Ok(v1::security_profile::ProfileType::Unconfined) => Ok(Apparmor::Unconfined),
        Ok(v1::security_profile::ProfileType::Localhost) => local(&profile.localhost_ref),
        Err(_) => Err(unknown_enum(FIELD, profile.profile_type)),
    }
}

#[cfg(test)]
mod tests {
    use super::super::samples::container_field;
    use super::*;

    #[test]
    fn a_target_pid_namespace_needs_its_target() {
        let with = |target: &str| {
            container_field(|c| {
                c.linux = Some(v1::LinuxContainerConfig {
                    resources: None,
                    security_context: Some(v1::LinuxContainerSecurityContext {
                        namespace_options: Some(v1::NamespaceOption {
                            pid: v1::NamespaceMode::Target as i32,
                            target_id: target.into(),
                            ..Default::default()
                        }),
                        ..Default::default()
                    }),
                });
            })
        };
        assert!(with("").is_err());
        assert_eq!(
            with("abc").unwrap().security.unwrap().pid,
            PidNamespace::Target("abc".into())
        );
    }

    #[test]
    fn old_spellings_of_seccomp_profiles_still_mean_the_same() {
        assert_eq!(seccomp(None, "").unwrap(), Seccomp::Unconfined);
        assert_eq!(seccomp(None, "runtime/default").unwrap(), Seccomp::RuntimeDefault);
        assert_eq!(
            seccomp(None, "localhost//etc/p.json").unwrap(),
            Seccomp::Localhost("/etc/p.json".into())
        );
        assert!(seccomp(None, "localhost/p.json").is_err());
    }
}

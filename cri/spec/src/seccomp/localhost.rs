//! Profiles from files, in OCI's form (`architectures`) or Docker's (`archMap`, `includes`,
//! `excludes`), checked before a kernel sees them.

use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction as Action, LinuxSeccompArg, LinuxSeccompBuilder,
    LinuxSeccompFilterFlag, LinuxSyscall,
};
use serde::Deserialize;

use crate::error::SpecError;
use crate::input::CapabilitySet;

/// Largest profile; real ones have some 30 KiB.
const MAX_BYTES: usize = 1 << 20;

/// Most names in all rules together.
const MAX_NAMES: usize = 65_536;

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Profile {
    default_action: Action,
    default_errno_ret: Option<u32>,
    #[serde(default)]
    architectures: Vec<Arch>,
    #[serde(default)]
    arch_map: Vec<ArchMap>,
    #[serde(default)]
    flags: Vec<LinuxSeccompFilterFlag>,
    listener_path: Option<String>,
    #[serde(default, deserialize_with = "null_is_empty")]
    syscalls: Vec<Rule>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ArchMap {
    architecture: Arch,
    #[serde(default, deserialize_with = "null_is_empty")]
    sub_architectures: Vec<Arch>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Rule {
    #[serde(default)]
    names: Vec<String>,
    /// The form of profiles from before 2017.
    #[serde(default)]
    name: String,
    action: Action,
    errno_ret: Option<u32>,
    #[serde(default, deserialize_with = "null_is_empty")]
    args: Vec<LinuxSeccompArg>,
    #[serde(default)]
    includes: Condition,
    #[serde(default)]
    excludes: Condition,
}

/// When a rule of Docker's form applies.
#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Condition {
    #[serde(deserialize_with = "null_is_empty")]
    arches: Vec<String>,
    #[serde(deserialize_with = "null_is_empty")]
    caps: Vec<String>,
    min_kernel: Option<String>,
}

fn null_is_empty<'de, D: serde::Deserializer<'de>, T: Deserialize<'de>>(d: D) -> Result<Vec<T>, D::Error> {
    Option::<Vec<T>>::deserialize(d).map(Option::unwrap_or_default)
}

/// Go's names of architectures, as Docker's conditions use them.
fn go_architectures() -> &'static [&'static str] {
    if cfg!(target_arch = "x86_64") {
        &["amd64", "x86", "x32"]
    } else if cfg!(target_arch = "aarch64") {
        &["arm64", "arm"]
    } else {
        &[]
    }
}

fn native() -> Arch {
    super::of_this_architecture().0[0]
}

/// Parses and checks a profile.
pub(super) fn parse(
    bytes: &[u8],
    held: &CapabilitySet,
    kernel: (u32, u32),
) -> Result<LinuxSeccomp, SpecError> {
    let bad = |reason: &str| Err(SpecError::invalid("seccomp", "Localhost", reason));
    if bytes.len() > MAX_BYTES {
        return bad("is a profile of more than 1 MiB");
    }
    let profile: Profile = serde_json::from_slice(bytes).map_err(SpecError::SeccompJson)?;
    let notifies = profile.syscalls.iter().any(|r| r.action == Action::ScmpActNotify);
    if notifies || profile.default_action == Action::ScmpActNotify || profile.listener_path.is_some() {
        return bad("is a profile that asks a supervisor (SCMP_ACT_NOTIFY), which is not supported");
    }
    if profile.syscalls.iter().map(|r| r.names.len() + 1).sum::<usize>() > MAX_NAMES {
        return bad("is a profile with more than 65536 names");
    }
    let mut rules = Vec::new();
    for rule in profile.syscalls {
        if applies(&rule, held, kernel)? {
            rules.push(checked(rule)?);
        }
    }
    let mut architectures = profile.architectures;
    for map in profile
        .arch_map
        .into_iter()
        .filter(|m| m.architecture == native())
    {
        architectures.push(map.architecture);
        architectures.extend(map.sub_architectures);
    }
    if !architectures.is_empty()
        && !architectures
            .iter()
            .any(|a| [native(), Arch::ScmpArchNative].contains(a))
    {
        return bad("is a profile for other architectures than this machine's");
    }
    let mut seccomp = LinuxSeccompBuilder::default()
        .default_action(profile.default_action)
        .syscalls(rules);
    if let Some(errno) = profile.default_errno_ret {
        seccomp = seccomp.default_errno_ret(errno);
    }
    if !architectures.is_empty() {
        seccomp = seccomp.architectures(architectures);
    }
    if !profile.flags.is_empty() {
        seccomp = seccomp.flags(profile.flags);
    }
    Ok(seccomp.build().expect("the default action is set"))
}

fn checked(rule: Rule) -> Result<LinuxSyscall, SpecError> {
    let bad = |reason: &str| Err(SpecError::invalid("seccomp", "Localhost", reason));
    let mut names = rule.names;
    if !rule.name.is_empty() {
        names.push(rule.name);
    }
    let sound = |n: &String| !n.is_empty() && n.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
    if names.is_empty() || !names.iter().all(sound) {
        return bad("has a rule without the name of a system call");
    }
    if rule.args.len() > 6 || rule.args.iter().any(|a| a.index() > 5) {
        return bad("has a rule about an argument that system calls do not have");
    }
    if rule.errno_ret.is_some_and(|e| e > 4095) {
        return bad("has an errno beyond 4095");
    }
    Ok(super::rule(
        names,
        rule.action,
        rule.errno_ret,
        (!rule.args.is_empty()).then_some(rule.args),
    ))
}

fn applies(rule: &Rule, held: &CapabilitySet, kernel: (u32, u32)) -> Result<bool, SpecError> {
    let arch = |names: &[String]| names.iter().any(|a| go_architectures().contains(&a.as_str()));
    let (yes, no) = (&rule.includes, &rule.excludes);
    let old_kernel = |c: &Condition| -> Result<Option<bool>, SpecError> {
        let Some(text) = &c.min_kernel else {
            return Ok(None);
        };
        let mut parts = text.split('.').map(|p| p.parse::<u32>().ok());
        match (parts.next().flatten(), parts.next().flatten()) {
            (Some(major), Some(minor)) => Ok(Some(kernel < (major, minor))),
            _ => Err(SpecError::invalid(
                "seccomp",
                text.as_str(),
                "is not a kernel version (minKernel)",
            )),
        }
    };
    if !yes.arches.is_empty() && !arch(&yes.arches) || arch(&no.arches) {
        return Ok(false);
    }
    if !yes.caps.iter().all(|c| held.contains(c)) || no.caps.iter().any(|c| held.contains(c)) {
        return Ok(false);
    }
    Ok(old_kernel(yes)? != Some(true) && old_kernel(no)? != Some(false))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str, caps: &[&str]) -> Result<LinuxSeccomp, String> {
        let held = caps.iter().map(|c| (*c).to_owned()).collect();
        parse(text.as_bytes(), &held, (6, 1)).map_err(|e| e.to_string())
    }

    #[test]
    fn a_profile_in_oci_form_is_taken_as_it_is() {
        let text = r#"{"defaultAction":"SCMP_ACT_ALLOW","architectures":["SCMP_ARCH_NATIVE"],
            "syscalls":[{"names":["mkdir","mkdirat"],"action":"SCMP_ACT_ERRNO","errnoRet":13}]}"#;
        let got = read(text, &[]).unwrap();
        let rule = &got.syscalls().as_ref().unwrap()[0];
        assert_eq!((rule.names().len(), rule.errno_ret()), (2, Some(13)));
    }

    #[test]
    fn conditions_of_dockers_form_are_decided_here() {
        let text = r#"{"defaultAction":"SCMP_ACT_ERRNO","archMap":[
              {"architecture":"SCMP_ARCH_X86_64","subArchitectures":["SCMP_ARCH_X86"]},
              {"architecture":"SCMP_ARCH_AARCH64","subArchitectures":null}],
            "syscalls":[
              {"names":["bpf"],"action":"SCMP_ACT_ALLOW","includes":{"caps":["CAP_BPF"]}},
              {"names":["clone"],"action":"SCMP_ACT_ALLOW","args":null,"excludes":{"caps":["CAP_SYS_ADMIN"]}},
              {"names":["old"],"action":"SCMP_ACT_ALLOW","includes":{"minKernel":"4.8"}},
              {"names":["new"],"action":"SCMP_ACT_ALLOW","includes":{"minKernel":"99.0"}},
              {"names":["swapcontext"],"action":"SCMP_ACT_ALLOW","includes":{"arches":["ppc64le"]}},
              {"name":"legacy","action":"SCMP_ACT_ALLOW"}]}"#;
        let names = |caps: &[&str]| -> Vec<String> {
            read(text, caps)
                .unwrap()
                .syscalls()
                .iter()
                .flatten()
                .flat_map(|r| r.names().clone())
                .collect()
        };
        assert_eq!(names(&[]), ["clone", "old", "legacy"]);
        assert_eq!(names(&["CAP_BPF", "CAP_SYS_ADMIN"]), ["bpf", "old", "legacy"]);
        assert_eq!(
            read(text, &[]).unwrap().architectures().as_ref().unwrap()[0],
            native()
        );
    }

    #[test]
    fn profiles_that_are_none_or_ask_too_much_are_refused() {
        for text in [
            "",
            "[]",
            r#"{"syscalls":[]}"#,
            r#"{"defaultAction":"SCMP_ACT_SING"}"#,
            r#"{"defaultAction":"SCMP_ACT_ALLOW","architectures":["SCMP_ARCH_S390"]}"#,
            r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":[],"action":"SCMP_ACT_ERRNO"}]}"#,
            r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["a b"],"action":"SCMP_ACT_ERRNO"}]}"#,
            r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["a"],"action":"SCMP_ACT_NOTIFY"}]}"#,
            r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["a"],"action":"SCMP_ACT_ERRNO","args":[{"index":6,"value":1,"op":"SCMP_CMP_EQ"}]}]}"#,
            r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["a"],"action":"SCMP_ACT_ERRNO","errnoRet":5000}]}"#,
        ] {
            assert!(read(text, &[]).is_err(), "{text}");
        }
    }
}

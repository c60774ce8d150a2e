//! ARGs that stand before the first FROM, and those that every build has.

use super::PlanInput;
use crate::error::{Error, Problem};
use crate::instruction::{ArgDefinition, Statement};
use crate::shell::Lexer;
use std::collections::BTreeMap;

/// Build arguments every build may give without an ARG: RUN sees them, neither cache nor history do.
pub(crate) const PROXIES: [&str; 5] = ["HTTP_PROXY", "HTTPS_PROXY", "FTP_PROXY", "NO_PROXY", "ALL_PROXY"];

/// The platform arguments and TARGETSTAGE; a build argument of the name overrides.
pub(super) fn predefined(input: &PlanInput, target: &str) -> BTreeMap<String, String> {
    let build = &input.build_platform;
    let platform = input.target_platform.as_ref().unwrap_or(build);
    let target = if target.is_empty() { "default" } else { target };
    let values = [
        ("BUILDPLATFORM", build.to_string()),
        ("BUILDOS", build.os.clone()),
        ("BUILDOSVERSION", String::new()),
        ("BUILDARCH", build.architecture.clone()),
        ("BUILDVARIANT", build.variant.clone()),
        ("TARGETPLATFORM", platform.to_string()),
        ("TARGETOS", platform.os.clone()),
        ("TARGETOSVERSION", String::new()),
        ("TARGETARCH", platform.architecture.clone()),
        ("TARGETVARIANT", platform.variant.clone()),
        ("TARGETSTAGE", target.to_owned()),
    ];
    values
        .into_iter()
        .map(|(name, value)| {
            (
                name.to_owned(),
                input.build_args.get(name).cloned().unwrap_or(value),
            )
        })
        .collect()
}

/// `predefined` and the file's own global ARGs, in order: a default may use those before it.
pub(super) fn global(
    predefined: &BTreeMap<String, String>,
    definitions: &[(&Statement, &[ArgDefinition])],
    build_args: &BTreeMap<String, String>,
    escape: char,
) -> Result<BTreeMap<String, String>, Error> {
    let mut globals = predefined.clone();
    let mut size = 0_usize;
    for (statement, definitions) in definitions {
        for definition in *definitions {
            let value = match (build_args.get(&definition.name), &definition.default) {
                (Some(given), _) => given.clone(),
                (None, Some(default)) => {
                    let expanded = Lexer::new(escape).process(default, &globals);
                    let reason = |reason| Problem::Expansion {
                        word: default.clone(),
                        reason,
                    };
                    expanded.map_err(|r| Error::new(&statement.span, reason(r)))?.text
                }
                (None, None) => continue,
            };
            size = size.saturating_add(value.len());
            globals.insert(definition.name.clone(), value);
            if size > crate::shell::WORD_LIMIT {
                let problem = Problem::ExpansionTooLarge {
                    limit: crate::shell::WORD_LIMIT,
                };
                return Err(Error::new(&statement.span, problem));
            }
        }
    }
    Ok(globals)
}

/// What RUN gets of the proxy settings among the build arguments: each in both cases.
pub(crate) fn proxies(build_args: &BTreeMap<String, String>) -> Vec<(String, String)> {
    let mut out = Vec::new();
    for name in PROXIES {
        // Upper case sorts first, so that the lower-case spelling wins.
        let mut given = build_args
            .iter()
            .filter(|(k, _)| k.eq_ignore_ascii_case(name))
            .map(|(_, v)| v);
        if let Some(value) = given.next_back().filter(|v| !v.is_empty()) {
            out.push((name.to_owned(), value.clone()));
            out.push((name.to_lowercase(), value.clone()));
        }
    }
    out
}

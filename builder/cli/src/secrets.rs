//! `--secret id=ID[,src=FILE|,env=NAME]`, in the words of docker's build. What is read goes to the engine and nowhere else.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use slipway_engine::Secret;

/// Where one comes from.
#[derive(Debug, PartialEq, Eq)]
enum Origin {
    File(PathBuf),
    Environment(String),
}

/// Reads the secrets; of several with one id the last counts.
///
/// # Errors
/// A flag that says nothing or too much, a file that cannot be read or is too large to be a secret. No message quotes
/// contents.
pub fn read(flags: &[String]) -> Result<BTreeMap<String, Secret>> {
    let mut secrets = BTreeMap::new();
    for flag in flags {
        let known = |name: &str| std::env::var_os(name).is_some();
        let (id, origin) = parse(flag, known).with_context(|| format!("--secret {flag}"))?;
        let bytes =
            match origin {
                Origin::File(path) => {
                    file(&path).with_context(|| format!("--secret {flag}: cannot read {}", path.display()))?
                }
                Origin::Environment(name) => std::env::var_os(&name)
                    .map(OsStringExt::into_vec)
                    .unwrap_or_else(|| {
                        let what =
                            format!("warning: --secret {flag}: {name} is not set; the secret is empty");
                        crate::complain(&what);
                        Vec::new()
                    }),
            };
        if bytes.len() > Secret::MOST {
            bail!("--secret {flag}: a secret has at most {} KiB", Secret::MOST >> 10);
        }
        secrets.insert(id, Secret::new(bytes));
    }
    Ok(secrets)
}

/// A file, or what stands in its place: `src=<(pass show token)`.
fn file(path: &Path) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let most = Secret::MOST as u64 + 1;
    File::open(path)?.take(most).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn parse(flag: &str, in_environment: impl Fn(&str) -> bool) -> Result<(String, Origin)> {
    let (mut id, mut source, mut env, mut kind) = (None, None, None, None);
    for field in flag.split(',') {
        if field.contains('"') {
            bail!("quotes are not understood here; give the file a name without a comma");
        }
        let (key, value) = field
            .split_once('=')
            .ok_or_else(|| anyhow!("{field:?} is not key=value"))?;
        match key.trim().to_ascii_lowercase().as_str() {
            "id" => id = Some(value),
            "src" | "source" => source = Some(value),
            "env" => env = Some(value),
            "type" if matches!(value, "file" | "env") => kind = Some(value),
            "type" => bail!("the type {value:?} is neither file nor env"),
            other => bail!("unknown key {other:?}: id, src, env and type are known"),
        }
    }
    let some = |value: Option<&str>| value.filter(|v| !v.is_empty()).map(str::to_owned);
    let id = some(id).ok_or_else(|| anyhow!("it needs an id: id=NAME"))?;
    let origin = match (some(source), some(env), kind) {
        (Some(_), Some(_), _) => bail!("it has both a file (src) and a variable (env)"),
        (Some(name), None, Some("env")) | (None, Some(name), _) => Origin::Environment(name),
        (Some(path), None, _) => Origin::File(path.into()),
        // As docker has it: the variable of that name, else the file of that name.
        (None, None, kind) if kind == Some("env") || (kind.is_none() && in_environment(&id)) => {
            Origin::Environment(id.clone())
        }
        (None, None, _) => Origin::File(id.clone().into()),
    };
    Ok((id, origin))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_and_variables_are_told_apart_as_docker_does() {
        let parsed = |flag: &str| parse(flag, |name| name == "SET").unwrap();
        let file = |id: &str, path: &str| (id.to_owned(), Origin::File(path.into()));
        let env = |id: &str, name: &str| (id.to_owned(), Origin::Environment(name.to_owned()));
        assert_eq!(parsed("id=a,src=/f"), file("a", "/f"));
        assert_eq!(parsed("type=file,id=a,source=f"), file("a", "f"));
        assert_eq!(parsed("id=a,env=E"), env("a", "E"));
        assert_eq!(parsed("id=a,type=env,src=E"), env("a", "E"));
        assert_eq!(parsed("id=SET"), env("SET", "SET"));
        assert_eq!(parsed("id=unset"), file("unset", "unset"));
        assert_eq!(parsed("ID=SET,type=file"), file("SET", "SET"));
        for bad in [
            "",
            "id",
            "src=/f",
            "id=",
            "id=a,src=f,env=E",
            "id=a,typ=x",
            "id=a,type=x",
            "id=a,src=\"f,g\"",
        ] {
            assert!(parse(bad, |_| false).is_err(), "{bad}");
        }
    }
}

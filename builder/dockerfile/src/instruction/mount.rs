//! `RUN --mount=type=…,key=value`: its grammar, its keys, its defaults.

use super::csv;
use crate::error::Problem;
use crate::path;
use crate::step::Source;
use crate::suggest::nearest;
use serde::Serialize;

/// A mount as written: any value but `from` may hold variables, so that its type is known only after expansion.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountText {
    /// The flag's value.
    pub text: String,
    /// `from=`: a stage, a named context or an image.
    pub from: Option<String>,
}

/// A mount after expansion. Targets are absolute.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Mount {
    /// Where in the container; None for secrets that are only in the environment and for ssh without a target.
    pub target: Option<String>,
    /// No writes. (Writes to a bind mount are possible where this is false, and are thrown away.)
    pub read_only: bool,
    /// What is mounted.
    pub kind: MountKind,
}

/// The five types of mounts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum MountKind {
    /// Files of the context, a stage or an image.
    Bind {
        /// Whose files.
        from: Source,
        /// The path in it, absolute there.
        source: String,
    },
    /// A directory that outlives the build.
    Cache {
        /// Which: the same id is the same directory.
        id: String,
        /// How two builds share it.
        sharing: Sharing,
        /// What it starts with.
        from: Source,
        /// The path in `from`, absolute there.
        source: String,
        /// Permission bits of the directory when it is new.
        mode: Option<u32>,
        /// Its owner.
        uid: Option<u32>,
        /// Its group.
        gid: Option<u32>,
    },
    /// Memory.
    Tmpfs {
        /// Bytes; None: the kernel's limit.
        size: Option<u64>,
    },
    /// A secret of the build, as a file, or in the environment, or both.
    Secret {
        /// Which.
        id: String,
        /// The environment variable that gets it.
        env: Option<String>,
        /// Fail where the build has no such secret.
        required: bool,
        /// Permission bits of the file (0400).
        mode: Option<u32>,
        /// Its owner (0).
        uid: Option<u32>,
        /// Its group (0).
        gid: Option<u32>,
    },
    /// An ssh agent's socket.
    Ssh {
        /// Which agent; `default`.
        id: String,
        /// Fail where the build has no such agent.
        required: bool,
        /// Permission bits of the socket (0600).
        mode: Option<u32>,
        /// Its owner (0).
        uid: Option<u32>,
        /// Its group (0).
        gid: Option<u32>,
    },
}

/// How builds share a cache mount.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Sharing {
    /// All at once.
    #[default]
    Shared,
    /// Another directory where the first is in use.
    Private,
    /// One after the other.
    Locked,
}

const KEYS: [&str; 19] = [
    "type",
    "from",
    "source",
    "src",
    "target",
    "dst",
    "destination",
    "readonly",
    "ro",
    "readwrite",
    "rw",
    "id",
    "sharing",
    "required",
    "size",
    "mode",
    "uid",
    "gid",
    "env",
];

/// The fields of a mount while they are collected.
#[derive(Default)]
struct Fields {
    kind: Option<String>,
    source: Option<String>,
    target: Option<String>,
    read_only: Option<bool>,
    id: Option<String>,
    sharing: Option<Sharing>,
    required: Option<bool>,
    size: Option<u64>,
    mode: Option<u32>,
    uid: Option<u32>,
    gid: Option<u32>,
    env: Option<String>,
}

impl MountText {
    /// Checks what can be checked before expansion: the keys, and `from`.
    pub(super) fn read(text: String) -> Result<MountText, Problem> {
        let bad = |reason: String| Problem::BadMount {
            mount: text.clone(),
            reason,
        };
        let mut from = None;
        for field in csv::fields(&text).map_err(|r| bad(r.to_owned()))? {
            let (key, value) = match field.split_once('=') {
                Some((key, value)) => (key.to_ascii_lowercase(), Some(value)),
                None => (field.to_ascii_lowercase(), None),
            };
            if !KEYS.contains(&key.as_str()) {
                return Err(bad(format!("unknown key {key:?}{}", nearest(&key, KEYS))));
            }
            match (key.as_str(), value) {
                ("readonly" | "ro" | "readwrite" | "rw" | "required", None) => {}
                (key, None) => return Err(bad(format!("{key} needs a value"))),
                ("from", Some(value)) if value.trim_end_matches('$').contains('$') => {
                    let advice = "from cannot hold a variable; give the image a stage of its own";
                    return Err(bad(advice.to_owned()));
                }
                ("from", Some(value)) => from = Some(value.to_owned()).filter(|v| !v.is_empty()),
                _ => {}
            }
        }
        Ok(MountText { text, from })
    }

    /// The mount with its variables expanded, relative targets joined to `cwd`. `source` is what `from` means.
    pub(crate) fn expand(
        &self,
        source: Option<Source>,
        cwd: &str,
        expand: &mut dyn FnMut(&str) -> Result<String, Problem>,
    ) -> Result<Mount, Problem> {
        let bad = |reason: String| Problem::BadMount {
            mount: self.text.clone(),
            reason,
        };
        let mut fields = Fields::default();
        for field in csv::fields(&self.text).map_err(|r| bad(r.to_owned()))? {
            let (key, value) = match field.split_once('=') {
                Some((key, value)) => (key.to_ascii_lowercase(), expand(value)?),
                None => (field.to_ascii_lowercase(), "true".to_owned()),
            };
            fields.set(&key, value).map_err(&bad)?;
        }
        fields.mount(source, cwd).map_err(|reason| match reason {
            Refusal::Reason(reason) => bad(reason),
            Refusal::Target(target) => Problem::BadMountTarget { target },
        })
    }
}

enum Refusal {
    Reason(String),
    Target(String),
}

impl From<String> for Refusal {
    fn from(reason: String) -> Refusal {
        Refusal::Reason(reason)
    }
}

impl Fields {
    fn set(&mut self, key: &str, value: String) -> Result<(), String> {
        let invalid = || format!("invalid {key} {value:?}");
        let number = |radix| u32::from_str_radix(&value, radix).map_err(|_| invalid());
        match key {
            "type" => self.kind = Some(value.to_ascii_lowercase()),
            "source" | "src" => self.source = Some(value),
            "target" | "dst" | "destination" => self.target = Some(value),
            "readonly" | "ro" => self.read_only = Some(csv::parse_bool(&value).ok_or_else(invalid)?),
            "readwrite" | "rw" => self.read_only = Some(!csv::parse_bool(&value).ok_or_else(invalid)?),
            "required" => self.required = Some(csv::parse_bool(&value).ok_or_else(invalid)?),
            "id" => self.id = Some(value),
            "env" => self.env = Some(value),
            "size" => self.size = Some(parse_size(&value).ok_or_else(invalid)?),
            "mode" => self.mode = Some(number(8)?),
            "uid" => self.uid = Some(number(10)?),
            "gid" => self.gid = Some(number(10)?),
            "sharing" => {
                self.sharing = Some(match value.to_ascii_lowercase().as_str() {
                    "shared" => Sharing::Shared,
                    "private" => Sharing::Private,
                    "locked" => Sharing::Locked,
                    _ => {
                        return Err(format!(
                            "{}{}",
                            invalid(),
                            nearest(&value, ["shared", "private", "locked"])
                        ));
                    }
                });
            }
            _ => {}
        }
        Ok(())
    }

    /// Refuses what the type of mount has no use for.
    fn only(&self, kind: &str, allowed: &[&str]) -> Result<(), String> {
        let given = [
            ("sharing", self.sharing.is_some()),
            ("required", self.required.is_some()),
            ("size", self.size.is_some()),
            ("mode", self.mode.is_some()),
            ("uid", self.uid.is_some()),
            ("gid", self.gid.is_some()),
            ("env", self.env.is_some()),
        ];
        match given.iter().find(|(key, given)| *given && !allowed.contains(key)) {
            Some((key, _)) => Err(format!("a {kind} mount has no {key}")),
            None => Ok(()),
        }
    }

    fn mount(mut self, from: Option<Source>, cwd: &str) -> Result<Mount, Refusal> {
        let kind = self.kind.take().unwrap_or_else(|| "bind".to_owned());
        let target = self.target.take().filter(|t| !t.is_empty());
        let given = target.as_deref().map(|t| path::join(cwd, t));
        let required_target = || {
            // A mount over the root would hide what the command is to change.
            let target = given.clone().unwrap_or_else(|| path::join(cwd, ""));
            if target == "/" {
                Err(Refusal::Target(target))
            } else {
                Ok(Some(target))
            }
        };
        let source = path::join("/", self.source.as_deref().unwrap_or_default());
        let (mode, uid, gid, required) = (self.mode, self.uid, self.gid, self.required.unwrap_or_default());
        let text = |value: Option<String>| value.filter(|v| !v.is_empty());
        Ok(match kind.as_str() {
            "bind" => {
                self.only("bind", &[])?;
                let kind = MountKind::Bind {
                    from: from.unwrap_or(Source::Context),
                    source,
                };
                Mount {
                    target: required_target()?,
                    read_only: self.read_only.unwrap_or(true),
                    kind,
                }
            }
            "cache" => {
                self.only("cache", &["sharing", "mode", "uid", "gid"])?;
                let written = target.clone().unwrap_or_default();
                let id = text(self.id).unwrap_or_else(|| path::clean(&written));
                if from.is_none() && source != "/" {
                    // A part of a cache that others write to could become a link at any moment (CVE-2024-23651).
                    return Err("a cache mount has a source only with from".to_owned().into());
                }
                let from = from.unwrap_or(Source::Scratch);
                let sharing = self.sharing.unwrap_or_default();
                let kind = MountKind::Cache {
                    id,
                    sharing,
                    from,
                    source,
                    mode,
                    uid,
                    gid,
                };
                Mount {
                    target: required_target()?,
                    read_only: self.read_only.unwrap_or_default(),
                    kind,
                }
            }
            "tmpfs" => {
                self.only("tmpfs", &["size"])?;
                let kind = MountKind::Tmpfs {
                    size: self.size.filter(|s| *s > 0),
                };
                Mount {
                    target: required_target()?,
                    read_only: self.read_only.unwrap_or_default(),
                    kind,
                }
            }
            "secret" => {
                self.only("secret", &["required", "mode", "uid", "gid", "env"])?;
                self.secret(from, target.as_deref(), given)?
            }
            "ssh" => {
                self.only("ssh", &["required", "mode", "uid", "gid"])?;
                if self.source.is_some() {
                    return Err("an ssh mount has no source".to_owned().into());
                }
                let id = text(self.id).unwrap_or_else(|| "default".to_owned());
                let kind = MountKind::Ssh {
                    id,
                    required,
                    mode,
                    uid,
                    gid,
                };
                Mount {
                    target: given,
                    read_only: self.read_only.unwrap_or(true),
                    kind,
                }
            }
            _ => {
                let known = ["bind", "cache", "tmpfs", "secret", "ssh"];
                return Err(format!("unknown type {kind:?}{}", nearest(&kind, known)).into());
            }
        })
    }

    fn secret(
        self,
        from: Option<Source>,
        written: Option<&str>,
        target: Option<String>,
    ) -> Result<Mount, Refusal> {
        let text = |value: Option<String>| value.filter(|v| !v.is_empty());
        if from.is_some() {
            return Err("a secret mount has no from".to_owned().into());
        }
        let id = match (text(self.source), text(self.id)) {
            (Some(_), Some(_)) => return Err("source and id name the same thing".to_owned().into()),
            (source, id) => source
                .or(id)
                .or_else(|| written.map(|t| path::base(t).to_owned())),
        };
        let Some(id) = id else {
            return Err("a secret mount needs an id or a target".to_owned().into());
        };
        // Without a variable to go to, the secret goes to a file.
        let target = match (target, &self.env) {
            (None, None) => Some(format!("/run/secrets/{}", path::base(&id))),
            (target, _) => target,
        };
        // `env` without a name takes the secret's own.
        let env = self
            .env
            .map(|name| if name.is_empty() { id.clone() } else { name });
        let kind = MountKind::Secret {
            id,
            env,
            required: self.required.unwrap_or_default(),
            mode: self.mode,
            uid: self.uid,
            gid: self.gid,
        };
        Ok(Mount {
            target,
            read_only: self.read_only.unwrap_or(true),
            kind,
        })
    }
}

/// Bytes of `64m`, `1.5GiB`, `100`: units of 1024, whatever their spelling.
fn parse_size(text: &str) -> Option<u64> {
    let number = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (digits, unit) = text.split_at(number);
    let unit = unit.trim().to_ascii_lowercase();
    let unit = unit
        .strip_suffix("ib")
        .or(unit.strip_suffix('b'))
        .unwrap_or(&unit);
    let power = ["", "k", "m", "g", "t", "p"].iter().position(|u| *u == unit)?;
    let bytes = digits.parse::<f64>().ok()? * 1024_f64.powi(power as i32);
    (bytes < u64::MAX as f64).then_some(bytes as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(text: &str) -> Result<Mount, String> {
        let read = MountText::read(text.to_owned()).map_err(|p| p.to_string())?;
        let from = read.from.as_ref().map(|f| Source::Image(f.clone()));
        let mut expand = |v: &str| Ok(v.replace("$V", "value"));
        read.expand(from, "/work", &mut expand).map_err(|p| p.to_string())
    }

    #[test]
    fn every_type_has_its_defaults() {
        let bind = mount("target=x").unwrap();
        assert_eq!(bind.target.as_deref(), Some("/work/x"));
        assert!(bind.read_only);
        assert_eq!(
            bind.kind,
            MountKind::Bind {
                from: Source::Context,
                source: "/".into()
            }
        );
        let bind = mount("from=img,source=a/../b,target=/t,rw").unwrap();
        assert!(!bind.read_only);
        let from = Source::Image("img".into());
        assert_eq!(
            bind.kind,
            MountKind::Bind {
                from,
                source: "/b".into()
            }
        );
        let cache = mount("type=cache,target=/root/.cache/$V/,sharing=locked,mode=0700,uid=5").unwrap();
        assert_eq!(
            cache.kind,
            MountKind::Cache {
                id: "/root/.cache/value".into(),
                sharing: Sharing::Locked,
                from: Source::Scratch,
                source: "/".into(),
                mode: Some(0o700),
                uid: Some(5),
                gid: None
            }
        );
        assert!(!cache.read_only);
        let tmpfs = mount("type=tmpfs,target=/t,size=64m").unwrap();
        assert_eq!(tmpfs.kind, MountKind::Tmpfs { size: Some(64 << 20) });
        assert_eq!(
            mount("type=secret,id=aws").unwrap().target.as_deref(),
            Some("/run/secrets/aws")
        );
        assert_eq!(mount("type=secret,id=aws,env=AWS").unwrap().target, None);
        assert_eq!(mount("type=ssh,required").unwrap().target, None);
    }

    #[test]
    fn a_mount_that_cannot_be_says_why() {
        for (text, part) in [
            ("type=bnid,target=/x", "did you mean bind?"),
            ("tpye=bind,target=/x", "did you mean type?"),
            ("type=bind,target=/", "as its target"),
            ("type=bind,target=/x,size=5", "has no size"),
            ("type=cache,target=/x,required", "has no required"),
            ("type=cache,target=/x,sharing=lockde", "did you mean locked?"),
            ("type=secret", "needs an id"),
            ("type=secret,id=a,source=b", "the same thing"),
            ("type=ssh,source=x", "no source"),
            ("type=tmpfs,target=/x,size=many", "invalid size"),
            ("target", "needs a value"),
            ("from=$X,target=/x", "cannot hold a variable"),
            ("target=\"/x", "quote"),
        ] {
            let reason = mount(text).unwrap_err();
            assert!(reason.contains(part), "{text}: {reason}");
        }
    }

    #[test]
    fn sizes_count_in_1024s() {
        for (text, bytes) in [("100", 100), ("1k", 1024), ("1.5GiB", 3 << 29), ("2 MB", 2 << 20)] {
            assert_eq!(parse_size(text), Some(bytes), "{text}");
        }
        assert_eq!(parse_size("x"), None);
        assert_eq!(parse_size("99999999999999999999p"), None);
    }
}

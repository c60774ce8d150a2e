//! Platforms as OCI names them: `linux/arm64`, `linux/arm/v7`. Knows nothing of the host's own.

use serde::{Deserialize, Serialize};
use std::fmt;

/// An operating system, an architecture and its variant, in OCI's (Go's) spelling.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Platform {
    /// `linux`.
    pub os: String,
    /// `amd64`, `arm64`, `arm`, …
    pub architecture: String,
    /// `v7` of `arm/v7`; empty where the architecture has none.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub variant: String,
}

impl Platform {
    /// A platform without a variant.
    pub fn new(os: &str, architecture: &str) -> Platform {
        Platform {
            os: os.to_owned(),
            architecture: architecture.to_owned(),
            variant: String::new(),
        }
        .normalized()
    }

    /// Reads `os/arch[/variant]`, `os` alone or an architecture alone; what is missing comes from
    /// `default`. None where it is no platform.
    pub fn parse(text: &str, default: &Platform) -> Option<Platform> {
        let parts: Vec<&str> = text.split('/').collect();
        let sound =
            |p: &&str| !p.is_empty() && p.chars().all(|c| c.is_ascii_alphanumeric() || "_-.".contains(c));
        if parts.len() > 3 || !parts.iter().all(sound) {
            return None;
        }
        let (os, architecture, variant) = match parts[..] {
            [one] if is_known_os(one) => {
                return Some(Platform {
                    os: one.to_ascii_lowercase(),
                    ..default.clone()
                });
            }
            [one] => {
                let (architecture, variant) = normalize_architecture(one, "");
                if !is_known_architecture(&architecture) {
                    return None;
                }
                return Some(Platform {
                    os: default.os.clone(),
                    architecture,
                    variant,
                });
            }
            [os, architecture] => (os, architecture, ""),
            [os, architecture, variant] => (os, architecture, variant),
            _ => return None,
        };
        Some(
            Platform {
                os: os.to_owned(),
                architecture: architecture.to_owned(),
                variant: variant.to_owned(),
            }
            .normalized(),
        )
    }

    /// The same platform in the one spelling that OCI indexes use (`x86_64` → `amd64`, `arm64/v8` → `arm64`).
    pub fn normalized(&self) -> Platform {
        let (architecture, variant) = normalize_architecture(&self.architecture, &self.variant);
        let os = match self.os.to_ascii_lowercase().as_str() {
            "macos" => "darwin".to_owned(),
            os => os.to_owned(),
        };
        Platform {
            os,
            architecture,
            variant,
        }
    }
}

/// `os/arch[/variant]`.
impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        if !self.variant.is_empty() {
            write!(f, "/{}", self.variant)?;
        }
        Ok(())
    }
}

fn is_known_os(os: &str) -> bool {
    const KNOWN: [&str; 13] = [
        "aix",
        "android",
        "darwin",
        "dragonfly",
        "freebsd",
        "illumos",
        "ios",
        "linux",
        "netbsd",
        "openbsd",
        "plan9",
        "solaris",
        "windows",
    ];
    KNOWN.contains(&os.to_ascii_lowercase().as_str())
}

fn is_known_architecture(architecture: &str) -> bool {
    const KNOWN: [&str; 14] = [
        "386", "amd64", "arm", "arm64", "loong64", "mips", "mips64", "mips64le", "mipsle", "ppc64",
        "ppc64le", "riscv64", "s390x", "wasm",
    ];
    KNOWN.contains(&architecture)
}

fn normalize_architecture(architecture: &str, variant: &str) -> (String, String) {
    let (architecture, variant) = (architecture.to_ascii_lowercase(), variant.to_ascii_lowercase());
    match architecture.as_str() {
        "i386" => ("386".to_owned(), String::new()),
        "x86_64" | "x86-64" | "amd64" => (
            "amd64".to_owned(),
            if variant == "v1" { String::new() } else { variant },
        ),
        "aarch64" | "arm64" => (
            "arm64".to_owned(),
            if matches!(variant.as_str(), "8" | "v8") {
                String::new()
            } else {
                variant
            },
        ),
        "armhf" => ("arm".to_owned(), "v7".to_owned()),
        "armel" => ("arm".to_owned(), "v6".to_owned()),
        "arm" => match variant.as_str() {
            "" | "7" => (architecture, "v7".to_owned()),
            "5" | "6" | "8" => (architecture, format!("v{variant}")),
            _ => (architecture, variant),
        },
        _ => (architecture, variant),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Option<String> {
        Platform::parse(text, &Platform::new("linux", "amd64")).map(|p| p.to_string())
    }

    #[test]
    fn spellings_come_out_as_oci_writes_them() {
        for (text, expected) in [
            ("linux/amd64", "linux/amd64"),
            ("Linux/x86_64", "linux/amd64"),
            ("linux/aarch64", "linux/arm64"),
            ("linux/arm64/v8", "linux/arm64"),
            ("linux/arm", "linux/arm/v7"),
            ("linux/arm/6", "linux/arm/v6"),
            ("armhf", "linux/arm/v7"),
            ("arm64", "linux/arm64"),
            ("windows", "windows/amd64"),
            ("linux/amd64/v3", "linux/amd64/v3"),
        ] {
            assert_eq!(parse(text).as_deref(), Some(expected), "{text}");
        }
    }

    #[test]
    fn what_is_no_platform_is_refused() {
        for text in ["", "linux/", "/amd64", "a/b/c/d", "linux/am d64", "nonsense"] {
            assert_eq!(parse(text), None, "{text}");
        }
    }
}

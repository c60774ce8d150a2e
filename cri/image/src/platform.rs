//! Platforms, and which of an index's manifests fits one.
//!
//! Names are Go's (`GOOS`, `GOARCH`) with the variants the OCI image spec lists; other spellings are normalised.
//! Pure. Refuses to know the machine, except for [`Platform::host`].

use serde::{Deserialize, Serialize};
use std::fmt;

/// An operating system and processor architecture.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Platform {
    /// `linux`.
    pub os: String,
    /// `amd64`, `arm64`, …
    pub architecture: String,
    /// `v7`, `v8`, …
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
}

/// The text is not a platform.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{given:?} is not a platform: os/architecture or os/architecture/variant, as in linux/arm64/v8")]
pub struct PlatformError {
    given: String,
}

impl Platform {
    /// A platform with its names normalised (`x86_64` is `amd64`, `aarch64` is `arm64`, arm is v7 by default).
    pub fn new(os: &str, architecture: &str, variant: Option<&str>) -> Platform {
        let os = os.to_ascii_lowercase();
        let variant = variant.map(str::to_ascii_lowercase).filter(|v| !v.is_empty());
        let architecture = architecture.to_ascii_lowercase();
        let (architecture, variant) = match (architecture.as_str(), variant.as_deref()) {
            ("x86_64" | "x86-64" | "amd64", None | Some("v1")) => ("amd64", None),
            ("x86_64" | "x86-64" | "amd64", _) => ("amd64", variant),
            ("i386" | "i486" | "i586" | "i686" | "x86" | "386", _) => ("386", None),
            ("aarch64" | "arm64", None | Some("8" | "v8")) => ("arm64", None),
            ("aarch64" | "arm64", _) => ("arm64", variant),
            ("armhf", _) => ("arm", Some("v7".to_owned())),
            ("armel", _) => ("arm", Some("v6".to_owned())),
            ("arm", None) => ("arm", Some("v7".to_owned())),
            ("arm", Some("5" | "6" | "7" | "8")) => ("arm", variant.map(|v| format!("v{v}"))),
            ("powerpc64le" | "ppc64el", _) => ("ppc64le", variant),
            ("loongarch64", _) => ("loong64", variant),
            (other, _) => (other, variant),
        };
        Platform {
            os,
            architecture: architecture.to_owned(),
            variant,
        }
    }

    /// The platform of this program's machine.
    pub fn host() -> Platform {
        Platform::new(std::env::consts::OS, std::env::consts::ARCH, None)
    }

    /// Reads `linux/amd64` or `linux/arm/v7`.
    ///
    /// # Errors
    /// [`PlatformError`].
    pub fn parse(text: &str) -> Result<Platform, PlatformError> {
        let error = || PlatformError {
            given: text.chars().take(80).collect(),
        };
        let word = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-');
        let parts: Vec<&str> = text.split('/').collect();
        if parts
            .iter()
            .any(|part| part.is_empty() || !part.bytes().all(word))
        {
            return Err(error());
        }
        match parts[..] {
            [os, architecture] => Ok(Platform::new(os, architecture, None)),
            [os, architecture, variant] => Ok(Platform::new(os, architecture, Some(variant))),
            _ => Err(error()),
        }
    }

    /// How well an image made for `offered` runs here: 0 is exact, more is worse, `None` not at all. A machine
    /// runs the older variants of its architecture, amd64 runs 386, and arm64 the 32-bit arm variants.
    pub fn rank(&self, offered: &Platform) -> Option<u32> {
        if self.os != offered.os {
            return None;
        }
        let level = |p: &Platform, default: u32| match &p.variant {
            None => Some(default),
            Some(variant) => variant
                .strip_prefix('v')
                .and_then(|digits| digits.parse::<u32>().ok()),
        };
        let older = |mine: Option<u32>, theirs: Option<u32>| mine?.checked_sub(theirs?);
        match (self.architecture.as_str(), offered.architecture.as_str()) {
            ("amd64", "amd64") => older(level(self, 1), level(offered, 1)),
            ("amd64", "386") => Some(100),
            ("arm", "arm") => older(level(self, 7), level(offered, 7)),
            ("arm64", "arm64") => older(level(self, 8), level(offered, 8)),
            ("arm64", "arm") => older(Some(8), level(offered, 7)).map(|distance| 100 + distance),
            (mine, theirs) if mine == theirs && self.variant == offered.variant => Some(0),
            (mine, theirs) if mine == theirs && (self.variant.is_none() || offered.variant.is_none()) => {
                Some(1)
            }
            _ => None,
        }
    }

    /// The position of the offer that fits best; the first of equals.
    pub fn choose<'a>(&self, offers: impl IntoIterator<Item = Option<&'a Platform>>) -> Option<usize> {
        let ranked = offers.into_iter().enumerate();
        let fitting = ranked.filter_map(|(at, offer)| Some((self.rank(offer?)?, at)));
        fitting.min().map(|(_, at)| at)
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        match &self.variant {
            Some(variant) => write!(f, "/{variant}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn platform(text: &str) -> Platform {
        Platform::parse(text).unwrap()
    }

    #[test]
    fn other_spellings_mean_the_same() {
        for (given, meant) in [
            ("linux/x86_64", "linux/amd64"),
            ("Linux/AMD64/v1", "linux/amd64"),
            ("linux/aarch64", "linux/arm64"),
            ("linux/arm64/v8", "linux/arm64"),
            ("linux/arm", "linux/arm/v7"),
            ("linux/armhf", "linux/arm/v7"),
            ("linux/arm/6", "linux/arm/v6"),
            ("linux/i686", "linux/386"),
            ("linux/riscv64", "linux/riscv64"),
        ] {
            assert_eq!(platform(given).to_string(), meant);
        }
        for bad in ["", "linux", "linux/", "/amd64", "a/b/c/d", "linux/am d64"] {
            assert!(Platform::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_nearest_platform_is_chosen_and_no_newer_one() {
        let choose = |mine: &str, offers: &[&str]| {
            let offers: Vec<Platform> = offers.iter().map(|o| platform(o)).collect();
            platform(mine).choose(offers.iter().map(Some))
        };
        assert_eq!(
            choose("linux/amd64", &["linux/arm64", "linux/386", "linux/amd64"]),
            Some(2)
        );
        assert_eq!(choose("linux/amd64", &["linux/386", "windows/amd64"]), Some(0));
        assert_eq!(choose("linux/amd64", &["linux/amd64/v3"]), None);
        assert_eq!(
            choose(
                "linux/amd64/v3",
                &["linux/amd64", "linux/amd64/v2", "linux/amd64/v4"]
            ),
            Some(1)
        );
        assert_eq!(choose("linux/arm64", &["linux/arm/v5", "linux/arm/v7"]), Some(1));
        assert_eq!(choose("linux/arm/v6", &["linux/arm/v7", "linux/arm/v5"]), Some(1));
        assert_eq!(choose("linux/s390x", &["linux/amd64"]), None);
        assert_eq!(choose("linux/amd64", &["linux/amd64", "linux/amd64"]), Some(0));
    }

    #[test]
    fn an_offer_without_a_platform_is_never_chosen() {
        assert_eq!(platform("linux/amd64").choose([None, None]), None);
    }
}

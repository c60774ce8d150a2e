//! Classes of block IO: a file of them, which of them a container is in, and what that is in OCI's words.
//!
//! The file is the one that containerd and CRI-O read (`blockio` of goresctrl), so that a node's administrator writes it
//! once:
//! ```yaml
//! Classes:
//!   slow:
//!   - Weight: 80                     # without devices: of all that no rule below names; 10 to 1000
//!   - Devices: ["/dev/vd[a-z]", "/dev/disk/by-id/*SSD*"]
//!     ThrottleReadBps: 50M           # bytes a second, as Kubernetes writes quantities
//!     ThrottleWriteIOPS: 5k          # operations a second
//! ```
//! Of two rules for the same device the later one wins, parameter by parameter. Which devices a pattern means is for the
//! caller to find out: nothing here looks at /dev.

use std::collections::BTreeMap;

use oci_spec::runtime as oci;
use serde::{Deserialize, Serialize};

/// A pod's annotation: the class of all its containers.
const OF_POD: &str = "blockio.resources.beta.kubernetes.io/pod";
/// A pod's annotation, with a container's name behind it: the class of that one.
const OF_CONTAINER_IN_POD: &str = "blockio.resources.beta.kubernetes.io/container.";
/// A container's own annotation in the CRI.
const OF_CONTAINER: &str = "io.kubernetes.cri.blockio-class";

/// What a kernel takes as a weight.
const WEIGHTS: std::ops::RangeInclusive<u64> = 10..=1000;

/// Why a file of classes is not one.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BlockIoError {
    /// Not YAML.
    #[error("not valid YAML")]
    Yaml(#[source] slipway_cdi::ParseError),
    /// Other keys, or other types.
    #[error("not a file of block IO classes")]
    Shape(#[source] serde_json::Error),
    /// A value that no kernel takes.
    #[error("class {class:?}: {parameter} {value:?} {reason}")]
    Value {
        /// The class.
        class: String,
        /// The key.
        parameter: &'static str,
        /// What stands there.
        value: String,
        /// What is wrong with it, as the end of a sentence.
        reason: &'static str,
    },
}

/// The classes of a file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BlockIoClasses(BTreeMap<String, Vec<Rule>>);

/// One entry of a class; `None`: the parameter is not named.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Rule {
    /// Empty: of all devices, which only a weight can be.
    devices: Vec<String>,
    is: Parameters,
}

/// What one device is given. Rates are a second's; 0 is none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Parameters {
    /// 10 to 1000, for IO schedulers that know weights.
    pub weight: Option<u16>,
    /// Bytes.
    pub read_bps: Option<u64>,
    /// Bytes.
    pub write_bps: Option<u64>,
    /// Operations.
    pub read_iops: Option<u64>,
    /// Operations.
    pub write_iops: Option<u64>,
}

impl Parameters {
    fn override_by(&mut self, later: Parameters) {
        self.weight = later.weight.or(self.weight);
        self.read_bps = later.read_bps.or(self.read_bps);
        self.write_bps = later.write_bps.or(self.write_bps);
        self.read_iops = later.read_iops.or(self.read_iops);
        self.write_iops = later.write_iops.or(self.write_iops);
    }
}

/// What a class comes to on a machine.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BlockIo {
    /// Of every device that is not named: 10 to 1000.
    pub weight: Option<u16>,
    /// Each device once.
    pub devices: Vec<BlockDevice>,
}

/// One device of a class.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlockDevice {
    /// Device number.
    pub major: u32,
    /// Device number.
    pub minor: u32,
    /// What it is given.
    pub is: Parameters,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawFile {
    #[serde(rename = "Classes", default)]
    classes: Option<BTreeMap<String, Option<Vec<RawRule>>>>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "PascalCase", default)]
struct RawRule {
    devices: Option<Vec<String>>,
    weight: Option<String>,
    throttle_read_bps: Option<String>,
    throttle_write_bps: Option<String>,
    #[serde(rename = "ThrottleReadIOPS")]
    throttle_read_iops: Option<String>,
    #[serde(rename = "ThrottleWriteIOPS")]
    throttle_write_iops: Option<String>,
}

impl BlockIoClasses {
    /// Reads a file of classes.
    ///
    /// # Errors
    /// Text that is not such a file: it names the class and the parameter.
    pub fn from_yaml(text: &str) -> Result<BlockIoClasses, BlockIoError> {
        let value = slipway_cdi::yaml(text).map_err(BlockIoError::Yaml)?;
        if value.is_null() {
            return Ok(BlockIoClasses::default());
        }
        let raw: RawFile = serde_json::from_value(value).map_err(BlockIoError::Shape)?;
        let class = |(name, rules): (String, Option<Vec<RawRule>>)| {
            let rules = rules.into_iter().flatten().map(|raw| raw.check(&name));
            let rules = rules.collect::<Result<_, _>>()?;
            Ok((name, rules))
        };
        Ok(BlockIoClasses(
            raw.classes
                .into_iter()
                .flatten()
                .map(class)
                .collect::<Result<_, _>>()?,
        ))
    }

    /// Their names.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }

    /// What the class comes to, where `find` says which devices (major, minor) a pattern means; `None`: there is no such
    /// class.
    pub fn resolve(&self, class: &str, find: &mut dyn FnMut(&str) -> Vec<(u32, u32)>) -> Option<BlockIo> {
        let mut all = BlockIo::default();
        let mut devices: BTreeMap<(u32, u32), Parameters> = BTreeMap::new();
        for rule in self.0.get(class)? {
            if rule.devices.is_empty() {
                all.weight = rule.is.weight.or(all.weight);
            }
            for number in rule.devices.iter().flat_map(|pattern| find(pattern)) {
                devices.entry(number).or_default().override_by(rule.is);
            }
        }
        all.devices = devices
            .into_iter()
            .map(|((major, minor), is)| BlockDevice { major, minor, is })
            .collect();
        Some(all)
    }
}

impl RawRule {
    fn check(self, class: &str) -> Result<Rule, BlockIoError> {
        let wrong = |parameter, value: &str, reason| BlockIoError::Value {
            class: class.to_owned(),
            parameter,
            value: value.to_owned(),
            reason,
        };
        let number = |parameter, value: &Option<String>| match value.as_deref() {
            None | Some("") => Ok(None),
            Some(text) => quantity(text)
                .map(Some)
                .ok_or_else(|| wrong(parameter, text, "is not a quantity like 80, 50M or 2Gi")),
        };
        let weight = match number("Weight", &self.weight)? {
            Some(n) if !WEIGHTS.contains(&n) => {
                let text = self.weight.as_deref().unwrap_or_default();
                return Err(wrong("Weight", text, "is outside 10 to 1000"));
            }
            n => n.and_then(|n| u16::try_from(n).ok()),
        };
        let is = Parameters {
            weight,
            read_bps: number("ThrottleReadBps", &self.throttle_read_bps)?,
            write_bps: number("ThrottleWriteBps", &self.throttle_write_bps)?,
            read_iops: number("ThrottleReadIOPS", &self.throttle_read_iops)?,
            write_iops: number("ThrottleWriteIOPS", &self.throttle_write_iops)?,
        };
        let devices = self.devices.unwrap_or_default();
        if devices.is_empty()
            && is
                != (Parameters {
                    weight,
                    ..Parameters::default()
                })
        {
            let reason = "is missing beside a throttle, which is of devices";
            return Err(wrong("Devices", "", reason));
        }
        if let Some(bad) = devices.iter().find(|d| !d.starts_with('/')) {
            return Err(wrong("Devices", bad, "is not an absolute path or pattern"));
        }
        Ok(Rule { devices, is })
    }
}

/// A whole number of at least 0 as Kubernetes writes quantities; parts are rounded up.
fn quantity(text: &str) -> Option<u64> {
    let digits = text
        .trim_start_matches(|c: char| c.is_ascii_digit() || c == '.')
        .len();
    let (number, suffix) = text.split_at(text.len() - digits);
    let factor: u128 = match suffix {
        "" => 1,
        "k" => 1000,
        "M" => 1000_u128.pow(2),
        "G" => 1000_u128.pow(3),
        "T" => 1000_u128.pow(4),
        "P" => 1000_u128.pow(5),
        "Ki" => 1 << 10,
        "Mi" => 1 << 20,
        "Gi" => 1 << 30,
        "Ti" => 1 << 40,
        "Pi" => 1 << 50,
        _ => return None,
    };
    let (whole, part) = number.split_once('.').unwrap_or((number, ""));
    if whole.len() + part.len() == 0 || whole.len() + part.len() > 19 || part.contains('.') {
        return None;
    }
    let all: u128 = format!("{whole}{part}").parse().ok()?;
    let scale = 10_u128.pow(u32::try_from(part.len()).ok()?);
    u64::try_from((all * factor).div_ceil(scale)).ok()
}

/// The class that a container is in: its own annotation's, else the pod's for it, else the pod's. Empty is none.
pub fn class_of<'a>(
    container: &str,
    of_container: &'a BTreeMap<String, String>,
    of_pod: &'a BTreeMap<String, String>,
) -> Option<&'a str> {
    of_container
        .get(OF_CONTAINER)
        .or_else(|| of_pod.get(&format!("{OF_CONTAINER_IN_POD}{container}")))
        .or_else(|| of_pod.get(OF_POD))
        .map(String::as_str)
        .filter(|class| !class.is_empty())
}

/// In OCI's words.
pub(crate) fn to_oci(block_io: &BlockIo) -> oci::LinuxBlockIo {
    let throttles = |of: fn(&Parameters) -> Option<u64>| {
        let list: Vec<_> = block_io
            .devices
            .iter()
            .filter_map(|d| {
                let throttle = oci::LinuxThrottleDeviceBuilder::default()
                    .major(d.major)
                    .minor(d.minor)
                    .rate(of(&d.is)?);
                Some(throttle.build().expect("every field is set"))
            })
            .collect();
        (!list.is_empty()).then_some(list)
    };
    let weights: Vec<_> = block_io
        .devices
        .iter()
        .filter_map(|d| {
            let weight = oci::LinuxWeightDeviceBuilder::default()
                .major(d.major)
                .minor(d.minor)
                .weight(d.is.weight?);
            Some(weight.build().expect("every field has a value"))
        })
        .collect();
    let mut to = oci::LinuxBlockIo::default();
    to.set_weight(block_io.weight);
    to.set_weight_device((!weights.is_empty()).then_some(weights));
    to.set_throttle_read_bps_device(throttles(|p| p.read_bps));
    to.set_throttle_write_bps_device(throttles(|p| p.write_bps));
    to.set_throttle_read_iops_device(throttles(|p| p.read_iops));
    to.set_throttle_write_iops_device(throttles(|p| p.write_iops));
    to
}

/// Whether a name is what one part of a path in a pattern means: `*`, `?`, `[a-z]`, `[^0-9]`, and `\` before a character
/// that is itself. A pattern that is not well formed means nothing.
pub fn matches(pattern: &str, name: &str) -> bool {
    let Some(first) = pattern.chars().next() else {
        return name.is_empty();
    };
    let rest = &pattern[first.len_utf8()..];
    let after = || name.chars().next().map(|c| (c, &name[c.len_utf8()..]));
    match first {
        '*' => {
            let rest = rest.trim_start_matches('*');
            let ends = name.char_indices().map(|(at, _)| at).chain([name.len()]);
            ends.into_iter().any(|at| matches(rest, &name[at..]))
        }
        '?' => after().is_some_and(|(_, name)| matches(rest, name)),
        '[' => match (set(rest), after()) {
            (Some((within, rest)), Some((c, name))) => within(c) && matches(rest, name),
            _ => false,
        },
        '\\' => {
            let Some(literal) = rest.chars().next() else {
                return false;
            };
            after().is_some_and(|(c, name)| c == literal && matches(&rest[literal.len_utf8()..], name))
        }
        literal => after().is_some_and(|(c, name)| c == literal && matches(rest, name)),
    }
}

/// What follows a `[`: whether a character is in the set, and what follows the set.
fn set(text: &str) -> Option<(impl Fn(char) -> bool, &str)> {
    let (inverted, text) = match text.strip_prefix(['^', '!']) {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let end = text.char_indices().skip(1).find(|(_, c)| *c == ']')?.0;
    let inside: Vec<char> = text[..end].chars().collect();
    let mut ranges = Vec::new();
    let mut at = 0;
    while at < inside.len() {
        if at + 2 < inside.len() && inside[at + 1] == '-' {
            ranges.push(inside[at]..=inside[at + 2]);
            at += 3;
        } else {
            ranges.push(inside[at]..=inside[at]);
            at += 1;
        }
    }
    let within = move |c: char| ranges.iter().any(|r| r.contains(&c)) != inverted;
    Some((within, &text[end + 1..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = "Classes:\n  slow:\n  - Weight: 80\n  - Devices: [\"/dev/sd[a-z]\", /dev/vda]\n    ThrottleReadBps: 50M\n    ThrottleWriteBps: 1.5Mi\n    ThrottleReadIOPS: 10k\n    Weight: 50\n  - Devices: [/dev/sdb]\n    ThrottleReadBps: 100M\n    ThrottleWriteIOPS: 0\n  plain:\n  - Weight: 400\n  empty:\n";

    fn find(pattern: &str) -> Vec<(u32, u32)> {
        match pattern {
            "/dev/sd[a-z]" => vec![(8, 0), (8, 16)],
            "/dev/sdb" => vec![(8, 16)],
            _ => Vec::new(),
        }
    }

    #[test]
    fn later_rules_override_earlier_ones_parameter_by_parameter() {
        let classes = BlockIoClasses::from_yaml(FILE).unwrap();
        assert_eq!(classes.names().collect::<Vec<_>>(), ["empty", "plain", "slow"]);
        let slow = classes.resolve("slow", &mut find).unwrap();
        let first = Parameters {
            weight: Some(50),
            read_bps: Some(50_000_000),
            write_bps: Some(3 << 19),
            read_iops: Some(10_000),
            write_iops: None,
        };
        let second = Parameters {
            read_bps: Some(100_000_000),
            write_iops: Some(0),
            ..first
        };
        let device = |minor, is| BlockDevice { major: 8, minor, is };
        assert_eq!(slow.weight, Some(80));
        assert_eq!(slow.devices, [device(0, first), device(16, second)]);
        let plain = classes.resolve("plain", &mut find).unwrap();
        assert_eq!((plain.weight, plain.devices.len()), (Some(400), 0));
        assert_eq!(classes.resolve("empty", &mut find), Some(BlockIo::default()));
        assert_eq!(classes.resolve("fast", &mut find), None);
        for nothing in ["", "Classes:\n", "Classes: {}\n"] {
            assert_eq!(
                BlockIoClasses::from_yaml(nothing).unwrap(),
                BlockIoClasses::default()
            );
        }
    }

    #[test]
    fn oci_has_it_device_by_device() {
        let classes = BlockIoClasses::from_yaml(FILE).unwrap();
        let oci = to_oci(&classes.resolve("slow", &mut find).unwrap());
        let json = serde_json::to_value(&oci).unwrap();
        assert_eq!(
            json,
            serde_json::json!({
                "weight": 80,
                "weightDevice": [{"major": 8, "minor": 0, "weight": 50}, {"major": 8, "minor": 16, "weight": 50}],
                "throttleReadBpsDevice": [{"major": 8, "minor": 0, "rate": 50_000_000}, {"major": 8, "minor": 16, "rate": 100_000_000}],
                "throttleWriteBpsDevice": [{"major": 8, "minor": 0, "rate": 1_572_864}, {"major": 8, "minor": 16, "rate": 1_572_864}],
                "throttleReadIOPSDevice": [{"major": 8, "minor": 0, "rate": 10_000}, {"major": 8, "minor": 16, "rate": 10_000}],
                "throttleWriteIOPSDevice": [{"major": 8, "minor": 16, "rate": 0}],
            })
        );
    }

    #[test]
    fn what_is_wrong_is_named_by_class_and_parameter() {
        let error = |text: &str| BlockIoClasses::from_yaml(text).unwrap_err().to_string();
        let rule = |rule: &str| error(&format!("Classes:\n  c:\n  - {rule}\n"));
        assert_eq!(
            rule("Weight: 5"),
            "class \"c\": Weight \"5\" is outside 10 to 1000"
        );
        assert!(rule("Weight: heavy").contains("Weight \"heavy\" is not a quantity"));
        assert!(rule("ThrottleReadBps: 5M").contains("Devices"));
        assert!(rule("Devices: [sda]\n    Weight: 10").contains("\"sda\" is not an absolute"));
        assert!(rule("{Devices: [/dev/a], ThrottleReadIOPS: -1}").contains("ThrottleReadIOPS"));
        assert!(rule("Wait: 10").contains("not a file of block IO classes"));
        assert!(error("Clases: {}").contains("not a file of block IO classes"));
        assert!(error("a: [").contains("YAML"));
    }

    #[test]
    fn quantities_are_those_of_kubernetes() {
        for (text, want) in [
            ("0", 0),
            ("80", 80),
            ("50M", 50_000_000),
            ("2Gi", 2 << 30),
            ("0.5k", 500),
            (".1", 1),
            ("9223372036854775807", i64::MAX as u64),
        ] {
            assert_eq!(quantity(text), Some(want), "{text}");
        }
        for text in [
            "",
            "k",
            "1 M",
            "-1",
            "1.2.3",
            "1m",
            "1e3",
            "99999999999999999999",
            "9999P0",
        ] {
            assert_eq!(quantity(text), None, "{text}");
        }
    }

    #[test]
    fn the_container_s_own_annotation_goes_before_the_pod_s() {
        let map = |pairs: &[(&str, &str)]| -> BTreeMap<String, String> {
            pairs.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect()
        };
        let none = map(&[]);
        let pod = map(&[
            (OF_POD, "a"),
            ("blockio.resources.beta.kubernetes.io/container.main", "b"),
        ]);
        let own = map(&[(OF_CONTAINER, "c")]);
        assert_eq!(class_of("main", &own, &pod), Some("c"));
        assert_eq!(class_of("main", &none, &pod), Some("b"));
        assert_eq!(class_of("other", &none, &pod), Some("a"));
        assert_eq!(class_of("main", &none, &none), None);
        assert_eq!(class_of("main", &map(&[(OF_CONTAINER, "")]), &pod), None);
    }

    #[test]
    fn patterns_mean_what_a_shell_means_by_them() {
        for (pattern, name, want) in [
            ("sd[a-z]", "sda", true),
            ("sd[a-z]", "sda1", false),
            ("sd[^a-c]", "sdb", false),
            ("sd[!a-c]", "sdx", true),
            ("*SSD*", "ata-SSD-1", true),
            ("*SSD*", "ata-HDD", false),
            ("nvme?n1", "nvme0n1", true),
            ("*", "", true),
            ("**a", "ba", true),
            ("[]x]", "]", true),
            ("[a", "a", false),
            ("\\*", "*", true),
            ("\\*", "x", false),
            ("é?", "éà", true),
            ("", "", true),
        ] {
            assert_eq!(matches(pattern, name), want, "{pattern} {name}");
        }
    }
}

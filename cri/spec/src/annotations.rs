//! Which annotations reach the runtime. Those of users never steer it (CVE-2023-6476,
//! CVE-2024-3154): prefixes that any OCI runtime acts upon are left out even when the
//! configuration would let them through. Image labels do not come here at all.

use std::collections::HashMap;

use crate::error::SpecError;
use crate::input::SpecInput;

/// Prefixes that runtimes, ours or others', take as orders.
const ORDERS: [&str; 12] = [
    "org.systemd.property.",
    "org.opencontainers.",
    "org.criu.",
    "run.oci.",
    "io.crun.",
    "io.katacontainers.",
    "io.kubernetes.cri.",
    "io.kubernetes.cri-o.",
    "io.containerd.",
    "dev.gvisor.",
    "io.slipway.",
    "module.wasm.",
];

/// The annotations of the specification.
pub(crate) fn annotations(
    input: &SpecInput,
    warnings: &mut Vec<String>,
) -> Result<HashMap<String, String>, SpecError> {
    let mut kept = HashMap::new();
    for (key, value) in &input.annotations {
        let wanted = input.annotation_passthrough.iter().any(|p| matches(p, key));
        if !wanted {
            continue;
        }
        if ORDERS.iter().any(|o| key.starts_with(o)) {
            warnings.push(format!(
                "the annotation {key:?} would steer the runtime: it is left out"
            ));
            continue;
        }
        kept.insert(key.clone(), value.clone());
    }
    for (key, value) in &input.runtime_annotations {
        if key.is_empty() {
            return Err(SpecError::invalid(
                "runtime_annotations",
                key.as_str(),
                "is empty",
            ));
        }
        kept.insert(key.clone(), value.clone());
    }
    Ok(kept)
}

fn matches(pattern: &str, key: &str) -> bool {
    !key.is_empty()
        && pattern
            .strip_suffix('*')
            .map_or(pattern == key, |prefix| key.starts_with(prefix))
}

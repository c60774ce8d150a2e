//! The families of `/metrics`. Pure. Units are Prometheus' base units; what a card does not tell has no series.
//!
//! A device that exactly one container has carries its namespace, pod and container on every series; who shares one says
//! `slipway_gpu_allocated`.

use slipway_gpu::{Gpu, Sample};

use super::gather::Facts;
use super::page::Page;

const KIB: f64 = 1024.0;

/// A device's own labels: of a GPU, or of a MIG device.
struct Device<'a> {
    index: String,
    uuid: &'a str,
    profile: &'a str,
    holder: [&'a str; 3],
}

impl<'a> Device<'a> {
    fn of(facts: &'a Facts, gpu: &'a Gpu, uuid: &'a str, profile: &'a str) -> Device<'a> {
        let holders = facts.snapshot.as_ref().map_or(&[][..], |s| s.holders(uuid));
        Device {
            index: gpu.index.to_string(),
            uuid,
            profile,
            holder: match holders {
                [(_, h)] => [&h.namespace, &h.pod, &h.container],
                _ => [""; 3],
            },
        }
    }

    fn labels(&self) -> [(&'static str, &str); 6] {
        let [namespace, pod, container] = self.holder;
        [
            ("gpu", &self.index),
            ("uuid", self.uuid),
            ("mig", self.profile),
            ("namespace", namespace),
            ("pod", pod),
            ("container", container),
        ]
    }
}

/// A family of one figure, or a few told apart by a label, of each GPU.
struct Family {
    name: &'static str,
    kind: &'static str,
    help: &'static str,
    label: &'static str,
    values: fn(&Sample) -> Vec<(&'static str, f64)>,
}

fn one(value: Option<f64>) -> Vec<(&'static str, f64)> {
    value.map(|v| ("", v)).into_iter().collect()
}

fn two<T: Into<f64>>(
    names: [&'static str; 2],
    values: Option<(T, T)>,
    factor: f64,
) -> Vec<(&'static str, f64)> {
    let values = values.map(|(a, b)| [a.into() * factor, b.into() * factor]);
    values.map_or_else(Vec::new, |v| names.into_iter().zip(v).collect())
}

#[allow(clippy::cast_precision_loss, reason = "Prometheus' values are floats")]
fn wide((a, b): (u64, u64)) -> (f64, f64) {
    (a as f64, b as f64)
}

const FAMILIES: [Family; 12] = [
    Family {
        name: "slipway_gpu_utilization_ratio",
        kind: "gauge",
        help: "Part of the last period in which the cores, or the memory, were busy.",
        label: "part",
        values: |s| two(["cores", "memory"], s.utilization, 0.01),
    },
    Family {
        name: "slipway_gpu_power_watts",
        kind: "gauge",
        help: "Power drawn.",
        label: "",
        values: |s| one(s.power_mw.map(|mw| f64::from(mw) / 1e3)),
    },
    Family {
        name: "slipway_gpu_power_limit_watts",
        kind: "gauge",
        help: "Power allowed.",
        label: "",
        values: |s| one(s.power_limit_mw.map(|mw| f64::from(mw) / 1e3)),
    },
    Family {
        name: "slipway_gpu_temperature_celsius",
        kind: "gauge",
        help: "Temperature of the GPU.",
        label: "",
        values: |s| one(s.temperature.map(f64::from)),
    },
    Family {
        name: "slipway_gpu_clock_hertz",
        kind: "gauge",
        help: "Clocks.",
        label: "part",
        values: |s| two(["cores", "memory"], s.clocks_mhz, 1e6),
    },
    Family {
        name: "slipway_gpu_ecc_errors_total",
        kind: "counter",
        help: "Memory errors since the driver was loaded.",
        label: "kind",
        values: |s| two(["corrected", "uncorrected"], s.ecc.map(wide), 1.0),
    },
    Family {
        name: "slipway_gpu_remapped_rows",
        kind: "gauge",
        help: "Rows of memory that were remapped after errors.",
        label: "after",
        values: |s| {
            two(
                ["corrected", "uncorrected"],
                s.rows.map(|r| (r.corrected, r.uncorrected)),
                1.0,
            )
        },
    },
    Family {
        name: "slipway_gpu_row_remap_pending",
        kind: "gauge",
        help: "Whether a row waits for a reset to be remapped.",
        label: "",
        values: |s| one(s.rows.map(|r| u8::from(r.pending).into())),
    },
    Family {
        name: "slipway_gpu_row_remap_failed",
        kind: "gauge",
        help: "Whether a row could not be remapped.",
        label: "",
        values: |s| one(s.rows.map(|r| u8::from(r.failed).into())),
    },
    Family {
        name: "slipway_gpu_nvlinks_up",
        kind: "gauge",
        help: "NVLinks that are up.",
        label: "",
        values: |s| one(Some(s.links.into())),
    },
    Family {
        name: "slipway_gpu_nvlink_bytes_total",
        kind: "counter",
        help: "Data over all NVLinks since the driver was loaded.",
        label: "direction",
        values: |s| two(["sent", "received"], s.link_kib.map(wide), KIB),
    },
    Family {
        name: "slipway_gpu_memory_reserved_bytes",
        kind: "gauge",
        help: "Memory that the driver keeps.",
        label: "",
        values: |s| one(s.memory.map(|m| wide((m.reserved, 0)).0)),
    },
];

/// The page.
pub fn render(facts: &Facts) -> String {
    let mut page = Page::default();
    let gpus = &facts.posted.inventory.gpus;
    node(&mut page, facts);
    for family in &FAMILIES {
        page.family(family.name, family.kind, family.help);
        for gpu in gpus {
            let device = Device::of(facts, gpu, &gpu.uuid, "");
            let sample = facts.samples.get(&gpu.uuid);
            for (value, figure) in sample.map(family.values).unwrap_or_default() {
                page.series(family.name, &device.labels(), &[(family.label, value)], figure);
            }
        }
    }
    memory(&mut page, facts);
    xids(&mut page, facts);
    allocated(&mut page, facts);
    processes(&mut page, facts);
    page.finish()
}

/// What the node has, and whether it is well.
fn node(page: &mut Page, facts: &Facts) {
    let inventory = &facts.posted.inventory;
    let cuda = format!("{}.{}", inventory.cuda.0, inventory.cuda.1);
    page.family("slipway_gpu_info", "gauge", "What each GPU is.");
    for gpu in &inventory.gpus {
        let capability = format!("{}.{}", gpu.compute_capability.0, gpu.compute_capability.1);
        let index = gpu.index.to_string();
        let labels = [
            ("gpu", index.as_str()),
            ("uuid", &gpu.uuid),
            ("product", &gpu.name),
            ("pci", &gpu.pci),
            ("driver", &inventory.driver),
            ("cuda", &cuda),
            ("compute_capability", &capability),
            (
                "mig",
                match gpu.mig {
                    Some(true) => "on",
                    Some(false) => "off",
                    None => "",
                },
            ),
        ];
        page.series("slipway_gpu_info", &labels, &[], 1.0);
    }
    let help = "Whether a GPU, or all of its parts, may be handed out.";
    page.family("slipway_gpu_healthy", "gauge", help);
    for gpu in &inventory.gpus {
        let sick = facts.posted.health.of(&gpu.uuid);
        let device = Device::of(facts, gpu, &gpu.uuid, "");
        let xid = sick
            .and_then(|s| s.xid)
            .map(|x| x.to_string())
            .unwrap_or_default();
        // One that no container could be given is not: the node's condition says the same.
        let mut items = facts.posted.items.values().flatten();
        let kept_back = items.any(|i| i.gpu == gpu.uuid && i.unhealthy.is_some());
        let well = if sick.is_none() && !kept_back { 1.0 } else { 0.0 };
        page.series("slipway_gpu_healthy", &device.labels(), &[("xid", &xid)], well);
    }
    let name = "slipway_gpu_driver_released";
    let help = "Whether the agent has let go of the driver, and so looks at no GPU.";
    page.family(name, "gauge", help);
    page.series(name, &[], &[], u8::from(facts.released).into());
    let name = "slipway_gpu_sign";
    page.family(name, "gauge", "Signs of illness that the last look found.");
    for gpu in &inventory.gpus {
        let device = Device::of(facts, gpu, &gpu.uuid, "");
        for found in facts.posted.health.signs(&gpu.uuid) {
            page.series(name, &device.labels(), &[("sign", found.sign.name())], 1.0);
        }
    }
    page.family(
        "slipway_gpu_devices",
        "gauge",
        "Devices that kubelet may hand out, by resource.",
    );
    for (resource, items) in &facts.posted.items {
        let healthy = items.iter().filter(|i| i.unhealthy.is_none()).count();
        for (state, count) in [("healthy", healthy), ("unhealthy", items.len() - healthy)] {
            let count = u32::try_from(count).unwrap_or(u32::MAX).into();
            let labels = [("resource", resource.as_str()), ("state", state)];
            page.series("slipway_gpu_devices", &labels, &[], count);
        }
    }
}

fn memory(page: &mut Page, facts: &Facts) {
    for (name, help) in [
        ("slipway_gpu_memory_total_bytes", "Memory of a GPU or MIG device."),
        ("slipway_gpu_memory_used_bytes", "Memory in use."),
    ] {
        page.family(name, "gauge", help);
        let total = name.contains("total");
        for gpu in &facts.posted.inventory.gpus {
            let Some(sample) = facts.samples.get(&gpu.uuid) else {
                continue;
            };
            if let Some(memory) = sample.memory {
                let device = Device::of(facts, gpu, &gpu.uuid, "");
                let bytes = if total { memory.total } else { memory.used };
                page.series(name, &device.labels(), &[], wide((bytes, 0)).0);
            }
            for (uuid, used) in &sample.slices {
                let Some(slice) = gpu.mig_devices.iter().find(|m| m.uuid == *uuid) else {
                    continue;
                };
                let device = Device::of(facts, gpu, &slice.uuid, &slice.profile);
                let bytes = if total { slice.memory } else { *used };
                page.series(name, &device.labels(), &[], wide((bytes, 0)).0);
            }
        }
    }
}

fn xids(page: &mut Page, facts: &Facts) {
    let name = "slipway_gpu_xid_errors_total";
    page.family(name, "counter", "XIDs heard since the agent was started.");
    for ((uuid, xid), count) in &facts.posted.xids {
        if let Some(gpu) = facts.posted.inventory.gpus.iter().find(|g| g.uuid == *uuid) {
            let index = gpu.index.to_string();
            let labels = [("gpu", index.as_str()), ("uuid", uuid), ("xid", &xid.to_string())];
            page.series(name, &labels, &[], wide((*count, 0)).0);
        }
    }
}

fn allocated(page: &mut Page, facts: &Facts) {
    let name = "slipway_gpu_allocated";
    page.family(name, "gauge", "Which container has which device.");
    let Some(snapshot) = &facts.snapshot else { return };
    for gpu in &facts.posted.inventory.gpus {
        let slices = gpu
            .mig_devices
            .iter()
            .map(|m| (m.uuid.as_str(), m.profile.as_str()));
        for (uuid, profile) in std::iter::once((gpu.uuid.as_str(), "")).chain(slices) {
            let index = gpu.index.to_string();
            for (resource, holder) in snapshot.holders(uuid) {
                let labels = [
                    ("gpu", index.as_str()),
                    ("uuid", uuid),
                    ("mig", profile),
                    ("resource", resource),
                    ("namespace", &holder.namespace),
                    ("pod", &holder.pod),
                    ("container", &holder.container),
                ];
                page.series(name, &labels, &[], 1.0);
            }
        }
    }
}

fn processes(page: &mut Page, facts: &Facts) {
    for (name, help) in [
        (
            "slipway_gpu_process_memory_bytes",
            "Memory that a process uses on a GPU.",
        ),
        (
            "slipway_gpu_process_utilization_ratio",
            "Part of the last period in which a process kept the cores busy.",
        ),
    ] {
        page.family(name, "gauge", help);
        for (uuid, process, holder) in &facts.processes {
            let value = match name.contains("memory") {
                true => process.memory.map(|b| wide((b, 0)).0),
                false => process.utilization.map(|u| f64::from(u) / 100.0),
            };
            let gpu = facts.posted.inventory.gpus.iter().find(|g| g.uuid == *uuid);
            let (Some(value), Some(gpu)) = (value, gpu) else {
                continue;
            };
            let index = gpu.index.to_string();
            let slice = process.instance.and_then(|there| {
                let mut slices = gpu.mig_devices.iter();
                slices.find(|m| (m.gi, m.ci) == there)
            });
            let pid = process.pid.to_string();
            let of = |field: fn(&crate::pods::Holder) -> &str| holder.as_ref().map_or("", field);
            let labels = [
                ("gpu", index.as_str()),
                ("uuid", slice.map_or(uuid.as_str(), |m| &m.uuid)),
                ("mig", slice.map_or("", |m| &m.profile)),
                ("pid", &pid),
                ("namespace", of(|h| &h.namespace)),
                ("pod", of(|h| &h.pod)),
                ("container", of(|h| &h.container)),
            ];
            page.series(name, &labels, &[], value);
        }
    }
}

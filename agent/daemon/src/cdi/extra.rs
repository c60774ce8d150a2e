//! What a container with a GPU may get beside it: nodes of other drivers that work with the GPU's. They are of the whole node,
//! and none of them is any GPU's own, so only those are given that the configuration asks for, and only where they are there.

use std::fs;

use slipway_cdi::ContainerEdits;

use super::{Roots, bind, node};
use crate::config::Extra;

/// The nodes of each: a folder below /dev, and what their names begin with.
fn nodes(extra: Extra) -> &'static [(&'static str, &'static str)] {
    match extra {
        Extra::Gds => &[("", "nvidia-fs")],
        Extra::Gdrcopy => &[("", "gdrdrv")],
        Extra::Mofed => &[("infiniband", "uverbs"), ("infiniband", "rdma_cm")],
        Extra::Imex => &[("nvidia-caps-imex-channels", "channel0")],
    }
}

/// Files that go with GPUDirect Storage, below the driver's root.
const GDS_FILES: [&str; 2] = ["run/udev", "etc/cufile.json"];

/// Adds what is there of it.
pub fn add(extra: Extra, roots: &Roots, edits: &mut ContainerEdits) {
    let mut any = false;
    for (folder, start) in nodes(extra) {
        let read = fs::read_dir(roots.dev.join(folder))
            .into_iter()
            .flatten()
            .flatten();
        let mut names: Vec<String> = read
            .filter_map(|e| e.file_name().into_string().ok())
            .filter(|n| numbered(n, start))
            .collect();
        names.sort();
        for name in names {
            let name = format!("{folder}/{name}");
            if let Ok(found) = node(roots, name.trim_start_matches('/')) {
                found.put(edits);
                any = true;
            }
        }
    }
    if any && extra == Extra::Gds {
        for name in GDS_FILES {
            let host = roots.driver.join(name);
            if host.exists() {
                edits.mounts.push(bind(&host, &format!("/{name}")));
            }
        }
    }
}

/// Whether the name is `start`, or that and a number.
fn numbered(name: &str, start: &str) -> bool {
    name.strip_prefix(start)
        .is_some_and(|rest| rest.bytes().all(|b| b.is_ascii_digit()))
}

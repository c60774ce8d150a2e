//! Saying what there is: the CDI file, the board, and a plugin for each resource. A device that no container could be given is
//! posted as unhealthy, and none is posted before the file that has it is written.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;

use slipway_cdi::{Cache, ResolveError, Spec};
use slipway_gpu::{GpuEvent, Inventory};
use tokio::sync::mpsc;

use super::{Agent, Offered};
use crate::board::Posted;
use crate::cause::chain;
use crate::cdi::{self, Roots};
use crate::config::Allocate;
use crate::node::{self, Without};
use crate::plugin::{Pace, Plugin, keep_registered};

/// What the CDI file is made of.
struct Wanted {
    inventory: Inventory,
    roots: Roots,
    kind: String,
    folder: PathBuf,
    /// Whether devices are handed out by the names in it.
    by_name: bool,
}

/// What became of it.
struct Written {
    offered: Offered,
    /// For the log, each once.
    errors: Vec<String>,
}

impl Agent {
    /// Makes the CDI file anew, since the driver may be another or a node may have come, and posts what there is. None: the
    /// supervision has ended.
    pub(super) async fn refresh(&mut self, events: &mut mpsc::Receiver<GpuEvent>) -> Option<()> {
        let wanted = Wanted {
            inventory: self.inventory.clone(),
            roots: self.roots.clone(),
            kind: self.config.cdi.kind.clone(),
            folder: self.config.paths.cdi.clone(),
            by_name: self.config.resources.allocate == Allocate::Cdi,
        };
        // Files may be slow, and nothing else is to be.
        let written = tokio::task::spawn_blocking(move || wanted.write());
        match self.while_hearing(events, written).await? {
            Ok(written) => {
                self.offered = Some(written.offered);
                for error in written.errors {
                    if self.warned.insert(error.clone()) {
                        tracing::error!("{error}");
                    }
                }
            }
            Err(e) => tracing::error!(error = &e as &dyn std::error::Error, "make the CDI file"),
        }
        self.post();
        Some(())
    }

    /// Posts what is offered and how it is now, and has a plugin for each resource. Waits for nothing. Before anything is
    /// offered, kubelet is not told of any: to it, an empty list would be the end of all devices.
    pub(super) fn post(&mut self) {
        let Some(offered) = &self.offered else {
            self.board.send_modify(|posted| {
                let posted = Arc::make_mut(posted);
                posted.health.clone_from(&self.health);
                posted.xids.clone_from(&self.xids);
            });
            return;
        };
        let offer = node::offer(
            &offered.inventory,
            &self.health,
            &offered.without,
            &self.config.resources,
        );
        let names: Vec<String> = offer.resources.keys().cloned().collect();
        self.board.send_replace(Arc::new(Posted {
            inventory: offered.inventory.clone(),
            items: offer.resources,
            spec: offered.spec.clone(),
            health: self.health.clone(),
            xids: self.xids.clone(),
            silent: self.silent_uuids(&offered.inventory),
        }));
        for warning in offer.warnings {
            if self.warned.insert(warning.clone()) {
                tracing::warn!("{warning}");
            }
        }
        // A resource that is gone keeps its plugin, which says that there is none of it.
        for resource in names {
            let plugin = Plugin {
                resource: resource.clone(),
                folder: self.config.paths.kubelet.clone(),
                kind: self.config.cdi.kind.clone(),
                settings: self.config.resources.clone(),
                refuse_start: self.config.faults.refuse_start,
                refused: self.sides.refused.clone(),
                board: self.board.subscribe(),
                status: Arc::clone(&self.sides.status),
                pace: Pace::default(),
            };
            self.plugins
                .entry(resource)
                .or_insert_with(|| tokio::spawn(keep_registered(plugin)));
        }
    }
}

impl Agent {
    fn silent_uuids(&self, inventory: &Inventory) -> BTreeSet<String> {
        let silent = |g: &&slipway_gpu::Gpu| self.silent.contains_key(&g.index);
        let gpus = inventory.gpus.iter();
        gpus.filter(silent).map(|g| g.uuid.clone()).collect()
    }
}

impl Wanted {
    /// Every device, kept back for one reason.
    fn none(&self, reason: &str) -> Without {
        let devices = self.inventory.gpus.iter().flat_map(|g| {
            let slices = g.mig_devices.iter().map(|m| m.uuid.clone());
            std::iter::once(g.uuid.clone()).chain(slices)
        });
        devices.map(|uuid| (uuid, reason.to_owned())).collect()
    }

    fn write(self) -> Written {
        let (spec, without, errors) = self.make();
        let inventory = self.inventory;
        Written {
            offered: Offered {
                inventory,
                without,
                spec,
            },
            errors,
        }
    }

    fn make(&self) -> (Option<Spec>, Without, Vec<String>) {
        let made = match cdi::generate(&self.inventory, &self.roots, &self.kind) {
            Ok(made) => made,
            Err(e) => {
                let reason = format!("no container can be given a GPU: {}", chain(&e));
                let mut errors = vec![reason.clone()];
                // What the file says is not there any more.
                errors.extend(self.remove());
                return (None, self.none(&reason), errors);
            }
        };
        let reason = |e| format!("no container can be given it: {}", chain(e));
        let mut without: Without = made
            .left_out
            .iter()
            .map(|(uuid, e)| (uuid.clone(), reason(e)))
            .collect();
        let mut errors: Vec<String> = without
            .iter()
            .map(|(uuid, why)| format!("{uuid}: {why}"))
            .collect();
        let Some(spec) = made.spec else {
            errors.extend(self.remove());
            return (None, without, errors);
        };
        match cdi::write(&spec, &self.folder) {
            Ok(true) => {
                tracing::info!(folder = %self.folder.display(), devices = spec.devices.len(), "the CDI file is written");
            }
            Ok(false) => {}
            Err(e) => {
                let reason = format!(
                    "the CDI file cannot be written into {} (trying again): {e}",
                    self.folder.display()
                );
                errors.push(reason.clone());
                if self.by_name {
                    without = self.none(&reason);
                }
            }
        }
        let conflicts = self.conflicts(&spec);
        errors.extend(conflicts.values().next().cloned());
        if self.by_name {
            without.extend(conflicts);
        }
        (Some(spec), without, errors)
    }

    fn remove(&self) -> Option<String> {
        let e = cdi::remove(&self.folder).err()?;
        Some(format!(
            "the CDI file cannot be removed from {}: {e}",
            self.folder.display()
        ))
    }

    /// The devices that another file of the same folder has too: both are unusable then.
    fn conflicts(&self, spec: &Spec) -> Without {
        let cache = Cache::new(vec![self.folder.clone()]);
        let absent = |_: &std::path::Path| Err(std::io::ErrorKind::NotFound.into());
        let conflict = |device: &slipway_cdi::Device| {
            let name = format!("{}={}", spec.kind, device.name);
            match cache.resolve(&[name], &absent) {
                Err(e @ ResolveError::Conflict { .. }) => Some((
                    device.name.clone(),
                    format!(
                        "no container can be given it: remove the other file, or set cdi.kind to another name: {}",
                        chain(&e)
                    ),
                )),
                _ => None,
            }
        };
        spec.devices.iter().filter_map(conflict).collect()
    }
}

//! UpdateContainerResources: new limits for a live container, all of them or none.

use std::sync::Arc;

use slipway_shim_client::Shim;

use super::Container;
use crate::daemon::Daemon;
use crate::error::Error;
use crate::fail;
use crate::model::Resources;

const VERB: &str = "UpdateContainerResources";

/// Changes limits. What the update does not name (zero, empty) stays.
///
/// Written down first: a disk that takes no record has changed nothing, and after a crash in between the next start sets
/// what is written ([`enforce`]). Limits the kernel does not take are undone with those set before them.
pub async fn update(daemon: &Arc<Daemon>, id: &str, change: Resources) -> Result<(), Error> {
    let container = daemon.registry.container(id)?;
    let _turn = container.begin(VERB).await?;
    if !container.live() {
        return Err(container.wrong_state("change its limits"));
    }
    let shim = daemon
        .registry
        .pod(container.pod().as_str())?
        .live_shim("change limits in it")?;
    let recorded = container.state().resources;
    let before = in_force(&container);
    let after = merge(&before, &change);
    // What no kernel takes is refused before anything is touched.
    oci_json(&container, &after)?;
    record(daemon, &container, Some(after.clone())).await?;
    let changed = async {
        fail::point("update_container_resources.after_record").await?;
        apply(&shim, &container, &after).await?;
        fail::point("update_container_resources.after_apply").await?;
        Ok(())
    };
    let Err(error) = changed.await else { return Ok(()) };
    let undone = async {
        apply(&shim, &container, &undoing(&before, &change)).await?;
        record(daemon, &container, recorded).await
    };
    if let Err(undo) = undone.await {
        tracing::error!(container = %container.id(), error = undo.chain(), "old limits could not be set again");
    }
    Err(error)
}

/// Sets what the record says: a crash may have come between the two. Somebody may change it meanwhile.
pub async fn enforce(container: &Container, shim: &Shim) -> Result<(), Error> {
    let mut set = None;
    while container.live()
        && let Some(resources) = container.state().resources
        && set.as_ref() != Some(&resources)
    {
        apply(shim, container, &resources).await?;
        set = Some(resources);
    }
    Ok(())
}

async fn record(daemon: &Daemon, container: &Container, resources: Option<Resources>) -> Result<(), Error> {
    container
        .transition(&daemon.records, |state| {
            let other = state.resources != resources;
            state.resources = resources;
            other
        })
        .await
}

async fn apply(shim: &Shim, container: &Container, resources: &Resources) -> Result<(), Error> {
    let json = oci_json(container, resources)?;
    shim.update(container.id().as_str(), json)
        .await
        .map_err(Error::shim("change the limits", container.id()))
}

/// The limits a container has now.
pub fn in_force(container: &Container) -> Resources {
    container
        .state()
        .resources
        .unwrap_or_else(|| container.record().config.resources.clone())
}

fn oci_json(container: &Container, resources: &Resources) -> Result<String, Error> {
    let id = || container.id().to_string();
    let oci = slipway_spec::resources::to_oci(&resources.limits).map_err(Error::spec(container.id()))?;
    serde_json::to_string(&oci).map_err(|source| Error::Encode {
        what: "resources",
        id: id(),
        source,
    })
}

/// What takes a change back: the limits before it, and none where there was none. Only a set of CPUs or memory nodes that
/// had not been limited stays, because nobody here knows what its parent has.
fn undoing(before: &Resources, change: &Resources) -> Resources {
    let number = |old: i64, new: i64, none: i64| if old == 0 && new != 0 { none } else { old };
    let (old, new) = (&before.limits, &change.limits);
    let mut unified = old.unified.clone();
    for file in new.unified.keys().filter(|file| !old.unified.contains_key(*file)) {
        let none = match file.rsplit('.').next() {
            Some("max" | "high") => "max",
            Some("min" | "low") => "0",
            _ => continue,
        };
        unified.insert(file.clone(), none.to_owned());
    }
    Resources {
        limits: slipway_spec::Resources {
            cpu_period: number(old.cpu_period, new.cpu_period, 100_000),
            cpu_quota: number(old.cpu_quota, new.cpu_quota, -1),
            cpu_shares: number(old.cpu_shares, new.cpu_shares, 1024),
            memory_limit: number(old.memory_limit, new.memory_limit, -1),
            memory_swap_limit: number(old.memory_swap_limit, new.memory_swap_limit, -1),
            memory_reservation: number(old.memory_reservation, new.memory_reservation, -1),
            pids_limit: number(old.pids_limit, new.pids_limit, -1),
            unified,
            ..old.clone()
        },
        oom_score_adj: before.oom_score_adj,
    }
}

/// The CRI's zeroes and empty strings mean "as it is".
fn merge(before: &Resources, change: &Resources) -> Resources {
    let number = |old: i64, new: i64| if new == 0 { old } else { new };
    let text = |old: &String, new: &String| if new.is_empty() { old.clone() } else { new.clone() };
    let (old, new) = (&before.limits, &change.limits);
    let mut unified = old.unified.clone();
    unified.extend(new.unified.clone());
    let hugepages = if new.hugepage_limits.is_empty() {
        &old.hugepage_limits
    } else {
        &new.hugepage_limits
    };
    Resources {
        limits: slipway_spec::Resources {
            cpu_period: number(old.cpu_period, new.cpu_period),
            cpu_quota: number(old.cpu_quota, new.cpu_quota),
            cpu_shares: number(old.cpu_shares, new.cpu_shares),
            memory_limit: number(old.memory_limit, new.memory_limit),
            memory_swap_limit: number(old.memory_swap_limit, new.memory_swap_limit),
            memory_reservation: number(old.memory_reservation, new.memory_reservation),
            cpuset_cpus: text(&old.cpuset_cpus, &new.cpuset_cpus),
            cpuset_mems: text(&old.cpuset_mems, &new.cpuset_mems),
            pids_limit: number(old.pids_limit, new.pids_limit),
            hugepage_limits: hugepages.clone(),
            unified,
        },
        oom_score_adj: number(before.oom_score_adj, change.oom_score_adj),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_update_does_not_name_stays() {
        let mut before = Resources::default();
        before.limits.memory_limit = 64;
        before.limits.cpu_quota = 50_000;
        before.limits.unified.insert("memory.high".into(), "max".into());
        let mut change = Resources::default();
        change.limits.memory_limit = 96;
        change.limits.cpuset_cpus = "0".into();
        change.limits.unified.insert("memory.low".into(), "1".into());
        let after = merge(&before, &change).limits;
        assert_eq!(
            (after.memory_limit, after.cpu_quota, after.cpuset_cpus.as_str()),
            (96, 50_000, "0")
        );
        assert_eq!(after.unified.len(), 2);
    }

    #[test]
    fn what_was_not_limited_before_is_not_limited_after_an_undo() {
        let mut before = Resources::default();
        before.limits.cpu_shares = 512;
        let mut change = Resources::default();
        change.limits.memory_limit = 96;
        change.limits.cpu_shares = 1000;
        change.limits.unified.insert("memory.high".into(), "90".into());
        let undo = undoing(&before, &change).limits;
        assert_eq!((undo.memory_limit, undo.cpu_shares, undo.cpu_quota), (-1, 512, 0));
        assert_eq!(undo.unified["memory.high"], "max");
    }

    #[test]
    fn minus_one_takes_a_quota_away() {
        let mut before = Resources::default();
        before.limits.cpu_quota = 50_000;
        let mut change = Resources::default();
        change.limits.cpu_quota = -1;
        assert_eq!(merge(&before, &change).limits.cpu_quota, -1);
    }
}

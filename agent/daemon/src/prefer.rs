//! Which of the devices that are free go well together. Pure, and quick for any number of them: devices on one GPU are alike,
//! so what is compared is GPUs.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use slipway_gpu::{Gpu, Inventory};

use crate::node::Item;

/// Devices that are as good as each other: on one GPU, or replicas of one device.
struct Group<'a> {
    /// None: not in the inventory, and far from everything.
    gpu: Option<&'a Gpu>,
    /// In order.
    free: Vec<&'a str>,
    /// How many there are that have to be among the chosen.
    must: u32,
}

/// Chooses `size` of `available` that go well together, all of `must` among them. Never fails: what is not known to the
/// inventory counts as far from everything, and fewer are chosen where there are not enough.
pub fn prefer(
    inventory: &Inventory,
    items: &[Item],
    available: &[String],
    must: &[String],
    size: usize,
) -> Vec<String> {
    let known: BTreeMap<&str, &Item> = items.iter().map(|i| (i.id.as_str(), i)).collect();
    let gpus: BTreeMap<&str, &Gpu> = inventory.gpus.iter().map(|g| (g.uuid.as_str(), g)).collect();
    let shared = items.iter().any(|i| i.id != i.uuid);
    let mut groups: BTreeMap<(bool, &str), Group<'_>> = BTreeMap::new();
    let chosen: Vec<&str> = must.iter().take(size).map(String::as_str).collect();
    let wanted: BTreeSet<&str> = must.iter().map(String::as_str).collect();
    let rest: BTreeSet<&str> = available.iter().map(String::as_str).collect();
    let rest = rest.iter().filter(|id| !wanted.contains(*id));
    for (id, free) in chosen.iter().map(|c| (c, false)).chain(rest.map(|r| (r, true))) {
        let item = known.get(id);
        let key = item.map_or(*id, |i| if shared { &i.uuid } else { &i.gpu });
        let group = groups.entry((item.is_some(), key)).or_insert_with(|| Group {
            gpu: item.and_then(|i| gpus.get(i.gpu.as_str()).copied()),
            free: Vec::new(),
            must: 0,
        });
        match free {
            true => group.free.push(id),
            false => group.must += 1,
        }
    }
    let mut groups: Vec<Group<'_>> = groups.into_values().collect();
    groups.sort_by_key(|g| g.free.first().copied());
    let field = Field::new(inventory, groups, shared);
    let begun = !chosen.is_empty();
    let mut best = field.grow(None, size.saturating_sub(chosen.len()));
    if !begun && size > 1 && !shared {
        // Every GPU as a beginning: what grows best from it.
        for seed in (0..field.groups.len()).filter(|g| !field.groups[*g].free.is_empty()) {
            let grown = field.grow(Some(seed), size);
            if grown.0 > best.0 {
                best = grown;
            }
        }
    }
    chosen.into_iter().chain(best.1).map(str::to_owned).collect()
}

struct Field<'a> {
    groups: Vec<Group<'a>>,
    /// How near a device of one group is to one of another.
    near: Vec<Vec<i64>>,
    shared: bool,
}

impl<'a> Field<'a> {
    fn new(inventory: &Inventory, groups: Vec<Group<'a>>, shared: bool) -> Field<'a> {
        let nearness = |a: &Group<'_>, b: &Group<'_>| match (a.gpu, b.gpu) {
            (Some(a), Some(b)) => i64::from(inventory.nearness(a, b)),
            _ => 0,
        };
        let row = |a| groups.iter().map(|b| nearness(a, b)).collect();
        let near = groups.iter().map(row).collect();
        Field { groups, near, shared }
    }

    /// Adds `count` to what must be, the first of them from group `seed`: how near they are to each other, and their ids.
    ///
    /// Replicas: the least shared GPU first. Otherwise: near to what is chosen, then far from what stays, so that groups
    /// which belong together stay whole for whoever needs them.
    fn grow(&self, seed: Option<usize>, count: usize) -> (i64, Vec<&'a str>) {
        let all = 0..self.groups.len();
        let sum = |g: usize, of: &dyn Fn(&Group<'_>) -> i64| -> i64 {
            all.clone().map(|h| self.near[g][h] * of(&self.groups[h])).sum()
        };
        let mut taken: Vec<usize> = vec![0; self.groups.len()];
        let mut near: Vec<i64> = all.clone().map(|g| sum(g, &|h| h.must.into())).collect();
        let mut left: Vec<i64> = all.clone().map(|g| sum(g, &|h| h.free.len() as i64)).collect();
        let (mut total, mut ids) = (0, Vec::new());
        while ids.len() < count {
            let score = |g: usize| match self.shared {
                true => {
                    let group = &self.groups[g];
                    let free = group.free.len() - taken[g];
                    (-(taken[g] as i64 + i64::from(group.must)), free as i64)
                }
                false => (near[g], self.near[g][g] - left[g]),
            };
            let next = |g: usize| self.groups[g].free.get(taken[g]).copied();
            let best = match seed.filter(|_| ids.is_empty()) {
                Some(seed) => Some(seed),
                None => all
                    .clone()
                    .filter(|g| next(*g).is_some())
                    .max_by_key(|g| (score(*g), Reverse(next(*g)))),
            };
            let Some((g, id)) = best.and_then(|g| Some((g, next(g)?))) else {
                break;
            };
            total += near[g];
            ids.push(id);
            taken[g] += 1;
            for h in all.clone() {
                near[h] += self.near[h][g];
                left[h] -= self.near[h][g];
            }
        }
        (total, ids)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Resources;
    use crate::node::{Without, offer};
    use slipway_gpu::Links;
    use slipway_gpu::health::Health;
    use std::path::Path;
    use std::time::{Duration, Instant};

    fn gpu(index: u32, numa: u32, peers: &[u32]) -> Gpu {
        Gpu {
            index,
            uuid: format!("GPU-{index}"),
            pci: format!("pci{index}"),
            numa: Some(numa),
            links: Links {
                peers: peers.iter().map(|p| (format!("pci{p}"), 4)).collect(),
                switch: 0,
            },
            ..Gpu::default()
        }
    }

    fn inventory(gpus: Vec<Gpu>) -> Inventory {
        Inventory {
            gpus,
            ..Inventory::default()
        }
    }

    fn items(i: &Inventory, replicas: u32) -> Vec<Item> {
        let wanted = Resources {
            replicas,
            ..Resources::default()
        };
        let health = Health::load(Path::new("/no/such/file"), "boot").0;
        let mut all = offer(i, &health, &Without::new(), &wanted).resources;
        all.remove("nvidia.com/gpu").unwrap_or_default()
    }

    fn choose(i: &Inventory, replicas: u32, available: &[&str], must: &[&str], size: usize) -> Vec<String> {
        let owned = |list: &[&str]| -> Vec<String> { list.iter().map(|s| (*s).to_owned()).collect() };
        let mut got = prefer(i, &items(i, replicas), &owned(available), &owned(must), size);
        got.sort();
        got
    }

    #[test]
    fn pairs_that_are_linked_are_given_together_and_others_left_whole() {
        // Two linked pairs, and one GPU alone.
        let i = inventory(vec![
            gpu(0, 0, &[3]),
            gpu(1, 0, &[4]),
            gpu(2, 1, &[]),
            gpu(3, 1, &[0]),
            gpu(4, 1, &[1]),
        ]);
        let all = ["GPU-0", "GPU-1", "GPU-2", "GPU-3", "GPU-4"];
        assert_eq!(choose(&i, 1, &all, &[], 2), ["GPU-0", "GPU-3"]);
        assert_eq!(choose(&i, 1, &all, &["GPU-4"], 2), ["GPU-1", "GPU-4"]);
        assert_eq!(
            choose(&i, 1, &all, &[], 1),
            ["GPU-2"],
            "the lonely one goes first"
        );
        assert_eq!(
            choose(&i, 1, &["GPU-1", "GPU-2", "GPU-4"], &[], 2),
            ["GPU-1", "GPU-4"]
        );
    }

    #[test]
    fn a_choice_never_fails() {
        let i = inventory(vec![gpu(0, 0, &[])]);
        assert_eq!(choose(&i, 1, &["GPU-0", "GPU-gone"], &[], 2).len(), 2);
        assert_eq!(choose(&i, 1, &["GPU-0"], &[], 5), ["GPU-0"]);
        assert_eq!(choose(&i, 1, &[], &["GPU-gone"], 1), ["GPU-gone"]);
        assert!(choose(&i, 1, &["GPU-0"], &[], 0).is_empty());
    }

    #[test]
    fn replicas_are_spread_over_gpus() {
        let i = inventory(vec![gpu(0, 0, &[]), gpu(1, 0, &[])]);
        let available = ["GPU-0::0", "GPU-1::0", "GPU-1::1", "GPU-1::2"];
        assert_eq!(choose(&i, 3, &available, &[], 1), ["GPU-1::0"]);
        assert_eq!(choose(&i, 3, &available, &[], 2), ["GPU-0::0", "GPU-1::0"]);
        assert_eq!(
            choose(&i, 3, &available, &["GPU-1::0"], 2),
            ["GPU-0::0", "GPU-1::0"]
        );
    }

    #[test]
    fn a_choice_among_thousands_takes_no_time() {
        let i = inventory((0..16).map(|n| gpu(n, n / 8, &[n ^ 1])).collect());
        let items = items(&i, 128);
        let available: Vec<String> = items.iter().map(|i| i.id.clone()).collect();
        let began = Instant::now();
        assert_eq!(prefer(&i, &items, &available, &[], 1000).len(), 1000);
        // Each a device of its own, as with MIG.
        let alone: Vec<Item> = items
            .iter()
            .map(|i| Item {
                uuid: i.id.clone(),
                ..i.clone()
            })
            .collect();
        assert_eq!(prefer(&i, &alone, &available, &[], 1000).len(), 1000);
        // Milliseconds; minutes when every device is compared with every other.
        assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    }
}

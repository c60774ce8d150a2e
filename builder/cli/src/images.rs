//! `slipway images | tag | rmi | prune`: names and what hangs on them.

use anyhow::{Context, Result, anyhow, bail};
use serde_json::json;
use slipway_image::{CachePrune, Image, Reference, Removal, Store, Writer};

use crate::args::{Format, ImagesArgs, PruneArgs, RmiArgs, TagArgs};
use crate::text;

/// Runs blocking work of the store.
pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await?
}

/// The image that a name or id means.
pub fn find(store: &Store, name: &str) -> Result<Image> {
    store.find(name)?.ok_or_else(|| {
        let near = store.images().ok().and_then(|images| suggest(name, &images));
        let hint = near.map(|n| format!("; did you mean {n}?")).unwrap_or_default();
        anyhow!("there is no image {name} in the store{hint}")
    })
}

/// A name in the store that differs in its tag or its repository only.
fn suggest(name: &str, images: &[Image]) -> Option<String> {
    let wanted = Reference::parse(name).ok()?;
    let last = |repository: &str| repository.rsplit('/').next().unwrap_or_default().to_owned();
    let names = || images.iter().flat_map(|i| &i.names);
    names()
        .find(|n| n.name() == wanted.name())
        .or_else(|| names().find(|n| last(n.repository()) == last(wanted.repository())))
        .map(Reference::familiar)
}

/// One image as JSON.
pub fn json(image: &Image) -> serde_json::Value {
    let names: Vec<String> = image.names.iter().map(ToString::to_string).collect();
    json!({
        "id": image.id.to_string(),
        "names": names,
        "repo_digests": image.repo_digests,
        "size": image.size,
        "created": image.config.created(),
        "added": rfc3339(image.created_at),
        "layers": image.layers.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "pinned": image.pinned,
        "built_here": image.built_here,
        "intact": image.intact,
        "platform": format!("{}/{}", image.config.os(), image.config.architecture()),
    })
}

/// A time as JSON has it.
pub fn rfc3339(time: std::time::SystemTime) -> String {
    time::OffsetDateTime::from(time)
        .format(&time::format_description::well_known::Rfc3339)
        .unwrap_or_default()
}

/// `slipway images`.
pub async fn list(store: &Store, args: &ImagesArgs) -> Result<()> {
    let asked = store.clone();
    let mut images = blocking(move || Ok(asked.images()?)).await?;
    if let Some(name) = &args.name {
        let wanted = Reference::parse(name).with_context(|| format!("{name} is not the name of an image"))?;
        let tagged = name
            .rsplit('/')
            .next()
            .is_some_and(|last| last.contains([':', '@']));
        images.retain(|i| {
            i.names.iter().any(|n| {
                if tagged {
                    *n == wanted
                } else {
                    n.name() == wanted.name()
                }
            })
        });
    }
    if args.format.format == Format::Json {
        let all: Vec<_> = images.iter().map(json).collect();
        outln!("{}", serde_json::to_string_pretty(&all)?);
        return Ok(());
    }
    let id = |image: &Image| {
        let id = image.id.to_string();
        if args.no_trunc {
            id
        } else {
            text::short(&id).to_owned()
        }
    };
    if args.quiet {
        images.iter().for_each(|i| outln!("{}", id(i)));
        return Ok(());
    }
    let mut rows = Vec::new();
    for image in &images {
        let state = match (image.intact, image.built_here && image.repo_digests.is_empty()) {
            (false, _) => "torn: pull it again",
            (true, true) => "only here",
            (true, false) => "",
        };
        let mut row = |name: String, tag: String| {
            rows.push(vec![
                name,
                tag,
                id(image),
                text::ago(image.created_at),
                text::size(image.size),
                state.to_owned(),
            ]);
        };
        if image.names.is_empty() {
            row("<none>".to_owned(), "<none>".to_owned());
        }
        for name in &image.names {
            let shown = name.familiar();
            let (repository, tag) = match name.tag() {
                Some(tag) => (
                    shown
                        .strip_suffix(&format!(":{tag}"))
                        .unwrap_or(&shown)
                        .to_owned(),
                    tag.to_owned(),
                ),
                None => (
                    shown.split('@').next().unwrap_or(&shown).to_owned(),
                    "<none>".to_owned(),
                ),
            };
            row(repository, tag);
        }
    }
    out!(
        "{}",
        text::table(&["NAME", "TAG", "IMAGE ID", "ADDED", "SIZE", "STATE"], &rows)
    );
    Ok(())
}

/// `slipway tag`.
pub async fn tag(store: &Store, args: TagArgs) -> Result<()> {
    let name =
        Reference::parse(&args.name).with_context(|| format!("{} is not the name of an image", args.name))?;
    if name.digest().is_some() {
        bail!("{}: a name that is given cannot have a digest", args.name);
    }
    let store = store.clone();
    blocking(move || {
        let image = find(&store, &args.image)?;
        Ok(store.tag(&image.id, &name, Writer::User)?)
    })
    .await
}

/// `slipway rmi`: a name goes; the image goes with its last one.
pub async fn remove(store: &Store, args: RmiArgs) -> Result<()> {
    let store = store.clone();
    blocking(move || {
        let mut failed = Vec::new();
        let mut removed = false;
        for name in &args.images {
            match remove_one(&store, name, args.force) {
                Ok(gone) => removed |= gone,
                Err(error) => failed.push(format!("{error:#}")),
            }
        }
        if removed {
            let report = store.gc().context("cannot collect garbage")?;
            outln!("freed {}", text::size(report.bytes));
        }
        if failed.is_empty() {
            Ok(())
        } else {
            Err(anyhow!(failed.join("\n")))
        }
    })
    .await
}

/// Whether an image went.
fn remove_one(store: &Store, name: &str, force: bool) -> Result<bool> {
    let image = find(store, name)?;
    let named = Reference::parse(name).ok().filter(|r| image.names.contains(r));
    let removal = match &named {
        Some(reference) => store.remove_name(reference)?,
        None => store.remove_unless_named(&image.id, if force { usize::MAX } else { 1 })?,
    };
    let familiar = |name: &String| Reference::parse(name).map_or_else(|_| name.clone(), |r| r.familiar());
    match removal {
        Removal::Untagged => outln!(
            "untagged {}",
            named.map_or_else(|| name.to_owned(), |r| r.familiar())
        ),
        Removal::Named(names) => {
            let names: Vec<String> = names.iter().map(familiar).collect();
            bail!(
                "{name} has several names ({}); remove them one by one, or all with -f",
                names.join(", ")
            );
        }
        Removal::Removed { id, names } => {
            names
                .iter()
                .for_each(|name| outln!("untagged {}", familiar(name)));
            outln!("removed {id}");
            return Ok(true);
        }
        Removal::Absent => bail!("{name} was removed by somebody else meanwhile"),
    }
    Ok(false)
}

/// `slipway prune`.
pub async fn prune(store: &Store, args: &PruneArgs) -> Result<()> {
    let which = CachePrune {
        all: args.unused_for.is_none() && args.keep_storage.is_none(),
        unused_for: args.unused_for,
        keep_bytes: args.keep_storage,
    };
    let store = store.clone();
    let (pruned, first, held) = blocking(move || {
        let entries = store.cache_prune(which).context("cannot prune the build cache")?;
        // One that cannot be removed keeps nothing else.
        let (mounts, first) = slipway_engine::prune_cache_mounts(store.root(), which.unused_for, which.all);
        // A build whose name another one took, and that was never pushed: nobody can mean it any more.
        let images = store
            .remove_unnamed_builds()
            .context("cannot remove the builds without a name")?
            .len();
        let report = match which.all {
            true => store.prune_blobs(),
            false => store.gc(),
        };
        let report = report.context("cannot collect garbage")?;
        let held = Held {
            images: store.images().map_or(0, |images| images.len()),
            at_work: store.actives().map_or(0, |actives| actives.len()),
        };
        let pruned = json!({
            "images": images, "cache_entries": entries, "cache_mounts": mounts.removed,
            "blobs": report.blobs, "snapshots": report.snapshots, "bytes": mounts.bytes + report.bytes,
        });
        Ok((pruned, first, held))
    })
    .await?;
    let first = first.context("cannot remove a cache mount");
    if args.format.format == Format::Json {
        outln!("{}", serde_json::to_string_pretty(&pruned)?);
        return first;
    }
    let freed = pruned["bytes"].as_u64().unwrap_or(0);
    outln!("freed {}", text::size(freed));
    if freed == 0
        && let Some(held) = held.in_words(which.all)
    {
        outln!("  {held}");
    }
    for (key, one, more) in [
        ("images", "unnamed image", "unnamed images"),
        (
            "cache_entries",
            "step of the build cache",
            "steps of the build cache",
        ),
        ("cache_mounts", "cache mount", "cache mounts"),
        ("snapshots", "snapshot", "snapshots"),
        ("blobs", "blob", "blobs"),
    ] {
        if let Some(count) = pruned[key].as_u64().filter(|n| *n > 0) {
            outln!("  {count} {}", if count == 1 { one } else { more });
        }
    }
    first
}

/// Who needs what a prune leaves.
struct Held {
    images: usize,
    /// Roots of containers and of builds' steps.
    at_work: usize,
}

impl Held {
    /// Where everything went, what is left and how that goes; `None`: nothing is left.
    fn in_words(&self, all: bool) -> Option<String> {
        let mut who = Vec::new();
        if self.images > 0 {
            who.push(format!(
                "images ({}: `slipway images` lists them, `slipway rmi` removes them)",
                self.images
            ));
        }
        if self.at_work > 0 {
            who.push(format!("containers and builds at work ({})", self.at_work));
        }
        if !all {
            who.push("the build cache's steps within these limits".to_owned());
        }
        (!who.is_empty()).then(|| format!("what is in the store belongs to {}", who.join(", and to ")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prune_that_frees_nothing_says_whose_everything_is() {
        let words = |images, at_work, all| Held { images, at_work }.in_words(all);
        assert_eq!(words(0, 0, true), None);
        let both = words(3, 1, false).unwrap();
        for want in ["images (3:", "slipway rmi", "at work (1)", "build cache"] {
            assert!(both.contains(want), "{both}");
        }
        assert!(!words(3, 0, true).unwrap().contains("at work"));
    }
}

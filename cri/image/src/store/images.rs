//! Images: committing, finding, naming, removing. What their identity means is told in [`crate::image`].

use super::{Lease, Manifest, Store};
use crate::catalog::images::{self, ImageRow, NewRow};
use crate::catalog::leases::{self, Item};
use crate::catalog::{Durability, layers, time};
use crate::digest::{ChainId, DiffId, Digest, ImageId};
use crate::error::{Result, StoreError};
use crate::failpoint;
use crate::image::{Image, NewImage, Removal, Removed, Writer};
use crate::platform::Platform;
use crate::reference::Reference;
use crate::registry::manifest::ConfigFacts;
use oci_spec::image::ImageConfiguration;
use slipway_snapshot::Usage;
use std::sync::PoisonError;
use std::time::{Duration, SystemTime};

/// So many digits make an id: fewer are taken for a name.
const SHORTEST_ID: usize = 12;

impl Store {
    /// Finds an image by id (`sha256:…`, or at least 12 hexadecimal digits) or reference (tag or digest, Docker's
    /// defaults). One that is torn is not found: it has to be pulled again. Where a digest means an image for each
    /// of several platforms, this machine's counts.
    ///
    /// # Errors
    /// [`StoreError::Ambiguous`]; what the catalog answers.
    pub fn resolve(&self, name: &str) -> Result<Option<Image>> {
        Ok(self.find(name)?.filter(|image| image.intact))
    }

    /// As [`Store::resolve`], for another platform than this machine's where a digest means several images.
    ///
    /// # Errors
    /// As [`Store::resolve`].
    pub fn resolve_for(&self, name: &str, platform: &Platform) -> Result<Option<Image>> {
        let Some(id) = self.image_id(name, platform)? else {
            return Ok(None);
        };
        Ok(self.image(&id)?.filter(|image| image.intact))
    }

    /// As [`Store::resolve`], but finds torn images too: for inspecting and removing.
    ///
    /// # Errors
    /// As [`Store::resolve`].
    pub fn find(&self, name: &str) -> Result<Option<Image>> {
        match self.image_id(name, &Platform::host())? {
            Some(id) => self.image(&id),
            None => Ok(None),
        }
    }

    fn image_id(&self, name: &str, platform: &Platform) -> Result<Option<ImageId>> {
        if let Ok(id) = name.parse::<ImageId>() {
            return Ok(Some(id));
        }
        self.inner.catalog.read(|c| {
            if let Ok(reference) = Reference::parse(name) {
                let text = reference.canonical().to_string();
                let found = match reference.digest() {
                    Some(_) => best(c, images::by_repo_digest(c, &text)?, platform)?,
                    None => images::by_name(c, &text)?,
                };
                if found.is_some() {
                    return Ok(found);
                }
            }
            let digits = name.strip_prefix("sha256:").unwrap_or(name);
            if !(SHORTEST_ID..=64).contains(&digits.len())
                || !digits.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
            {
                return Ok(None);
            }
            let found = images::by_prefix(c, digits)?;
            match found.as_slice() {
                [] => Ok(None),
                [one] => Ok(Some(*one)),
                many => Err(StoreError::Ambiguous {
                    prefix: name.to_owned(),
                    count: many.len(),
                }),
            }
        })
    }

    /// An image by its id.
    ///
    /// # Errors
    /// [`StoreError::BadConfig`]; what the catalog answers.
    pub fn image(&self, id: &ImageId) -> Result<Option<Image>> {
        match self.inner.catalog.read(|c| images::get(c, id))? {
            Some(row) => self.image_of(row).map(Some),
            None => Ok(None),
        }
    }

    /// All images, newest first.
    ///
    /// # Errors
    /// What the catalog answers.
    pub fn images(&self) -> Result<Vec<Image>> {
        self.inner
            .catalog
            .read(images::all)?
            .into_iter()
            .map(|row| self.image_of(row))
            .collect()
    }

    fn image_of(&self, row: ImageRow) -> Result<Image> {
        let (config, layers) = parse_config(row.id.digest(), &row.config)?;
        let names = row
            .names
            .iter()
            .map(|name| parse_name(name))
            .collect::<Result<Vec<_>>>()?;
        let created_at = time(row.since);
        let only_copy = row.built_here && !row.pushed && row.repo_digests.is_empty() && !names.is_empty();
        Ok(Image {
            id: row.id,
            config,
            pinned: row.pinned || (only_copy && self.still_pinned(created_at)),
            names,
            repo_digests: row.repo_digests,
            intact: self.intact(row.chain.as_ref())?,
            chain: row.chain,
            layers,
            size: row.size,
            created_at,
            built_here: row.built_here,
            manifest: row.manifest,
        })
    }

    fn still_pinned(&self, created_at: SystemTime) -> bool {
        let limit = *self.inner.pin_time.lock().unwrap_or_else(PoisonError::into_inner);
        match limit {
            None => true,
            Some(limit) => created_at.elapsed().unwrap_or_default() < limit,
        }
    }

    /// How long a never-pushed build counts as pinned; `None` (as at the start): for ever.
    pub fn pin_builds_for(&self, time: Option<Duration>) {
        *self.inner.pin_time.lock().unwrap_or_else(PoisonError::into_inner) = time;
    }

    /// The exact bytes of an image's configuration.
    ///
    /// # Errors
    /// [`StoreError::NoImage`].
    pub fn config(&self, id: &ImageId) -> Result<Vec<u8>> {
        let row = self.inner.catalog.read(|c| images::get(c, id))?;
        Ok(row.ok_or_else(|| no_image(id))?.config)
    }

    /// Gives an image a name, taking it from the image that had it. A reference with a digest is no name: where an
    /// image came from is among its repository digests.
    ///
    /// # Errors
    /// [`StoreError::NoImage`], [`StoreError::BadName`].
    pub fn tag(&self, id: &ImageId, name: &Reference, by: Writer) -> Result<()> {
        let text = name_of(name)?;
        self.inner.catalog.write(Durability::Full, |c| {
            images::get(c, id)?.ok_or_else(|| no_image(id))?;
            images::name(c, id, &text, by)
        })
    }

    /// Takes a name away; the image stays. `false`: nobody had it.
    ///
    /// # Errors
    /// What the catalog answers.
    #[cfg(test)]
    pub(crate) fn untag(&self, name: &Reference) -> Result<bool> {
        let text = name.canonical().to_string();
        let inner = &self.inner;
        inner.with_reserve(|| {
            inner
                .catalog
                .write(Durability::Full, |c| images::unname(c, &text))
        })
    }

    /// Who wrote a name last, and when.
    ///
    /// # Errors
    /// What the catalog answers.
    pub fn name_writer(&self, name: &Reference) -> Result<Option<(Writer, SystemTime)>> {
        let text = name.canonical().to_string();
        let found = self.inner.catalog.read(|c| images::writer(c, &text))?;
        Ok(found.map(|(writer, since)| (writer, time(since))))
    }

    /// Removes an image with all its names and what only it needed; absent is fine. Works on a full disk.
    ///
    /// # Errors
    /// What the catalog answers.
    pub fn remove_image(&self, id: &ImageId) -> Result<Removed> {
        let inner = &self.inner;
        let names = inner.with_reserve(|| {
            inner.catalog.write(Durability::Full, |c| {
                let names = images::get(c, id)?.map(|row| row.names);
                images::delete(c, id)?;
                Ok(names)
            })
        })?;
        let Some(names) = names else {
            return Ok(Removed::default());
        };
        failpoint::reach("remove_image.after_row");
        Ok(Removed {
            names,
            freed: self.gc()?.bytes,
        })
    }

    /// Takes a name away, and removes its image when that was the last: decided while nobody else can name it. The
    /// files go with the next [`Store::gc`].
    ///
    /// # Errors
    /// What the catalog answers.
    pub fn remove_name(&self, name: &Reference) -> Result<Removal> {
        let text = name.canonical().to_string();
        self.removing(|c| {
            let Some(id) = images::by_name(c, &text)? else {
                return Ok(Removal::Absent);
            };
            images::unname(c, &text)?;
            let named = images::get(c, &id)?.is_some_and(|row| !row.names.is_empty());
            if named {
                return Ok(Removal::Untagged);
            }
            images::delete(c, &id)?;
            Ok(Removal::Removed {
                id,
                names: vec![text.clone()],
            })
        })
    }

    /// Removes an image with its names, if there are no more than `most` of them: decided while nobody else can name
    /// it. The files go with the next [`Store::gc`].
    ///
    /// # Errors
    /// What the catalog answers.
    pub fn remove_unless_named(&self, id: &ImageId, most: usize) -> Result<Removal> {
        self.removing(|c| match images::get(c, id)? {
            None => Ok(Removal::Absent),
            Some(row) if row.names.len() > most => Ok(Removal::Named(row.names)),
            Some(row) => {
                images::delete(c, id)?;
                Ok(Removal::Removed {
                    id: *id,
                    names: row.names,
                })
            }
        })
    }

    /// Removes the builds that nobody can mean any more: without a name, not pinned, never pushed, and in no lease.
    /// The files go with the next [`Store::gc`].
    ///
    /// # Errors
    /// What the catalog answers.
    pub fn remove_unnamed_builds(&self) -> Result<Vec<ImageId>> {
        self.removing(images::delete_unnamed_builds)
    }

    /// One durable transaction that only takes away; it works on a full disk.
    fn removing<T>(&self, work: impl Fn(&rusqlite::Connection) -> Result<T>) -> Result<T> {
        let inner = &self.inner;
        inner.with_reserve(|| inner.catalog.write(Durability::Full, |c| work(c)))
    }

    /// Pins an image or takes the pin away. A never-pushed build stays pinned by itself.
    ///
    /// # Errors
    /// [`StoreError::NoImage`].
    #[cfg(test)]
    pub(crate) fn set_pinned(&self, id: &ImageId, pinned: bool) -> Result<()> {
        let found = self
            .inner
            .catalog
            .write(Durability::Full, |c| images::set_pinned(c, id, pinned))?;
        if found { Ok(()) } else { Err(no_image(id)) }
    }

    /// Records that an image was pushed: it exists elsewhere, under this manifest.
    ///
    /// # Errors
    /// [`StoreError::NoImage`].
    pub fn record_push(&self, id: &ImageId, repo_digest: &str, manifest: &Manifest) -> Result<()> {
        self.inner.catalog.write(Durability::Full, |c| {
            if !images::set_pushed(c, id)? {
                return Err(no_image(id));
            }
            images::add_repo_digest(c, id, repo_digest)?;
            images::add_manifest(c, id, &manifest.digest, &manifest.media_type, &manifest.bytes)
        })
    }

    /// A manifest by digest: its bytes and media type.
    ///
    /// # Errors
    /// What the catalog answers.
    pub fn manifest_bytes(&self, digest: &Digest) -> Result<Option<(Vec<u8>, String)>> {
        self.inner.catalog.read(|c| images::manifest(c, digest))
    }

    /// Commits an image in one transaction that is durable when it returns.
    ///
    /// # Errors
    /// [`StoreError::BadConfig`], [`StoreError::NoLayer`] when a layer is missing.
    pub fn commit_image(&self, new: NewImage<'_>) -> Result<Image> {
        let id = ImageId::from(Digest::of(new.config));
        let (_, diffs) = parse_config(id.digest(), new.config)?;
        let names = new.names.iter().map(name_of).collect::<Result<Vec<_>>>()?;
        let chain = ChainId::of(&diffs);
        if let Some(chain) = &chain
            && !self.intact(Some(chain))?
        {
            return Err(StoreError::NoLayer { chain: *chain });
        }
        check_manifest(&id, &new, diffs.len())?;
        failpoint::reach("commit_image.before_row");
        // Read in the same transaction: somebody may remove it the moment it is visible.
        let row = self.inner.catalog.write(Durability::Full, |c| {
            leases::hold(c, new.lease.name(), Item::Image, &id)?;
            let size = layers_usage(c, chain.as_ref())?.bytes + new.config.len() as u64;
            let built_here = new.writer == Writer::Build;
            let (config, chain) = (new.config, chain.as_ref());
            images::put(
                c,
                &NewRow {
                    id: &id,
                    config,
                    chain,
                    size,
                    built_here,
                },
            )?;
            for name in &names {
                images::name(c, &id, name, new.writer)?;
            }
            for digest in &new.repo_digests {
                images::add_repo_digest(c, &id, digest)?;
            }
            if let Some(manifest) = &new.manifest {
                images::add_manifest(
                    c,
                    &id,
                    &Digest::of(manifest.bytes),
                    &manifest.media_type,
                    manifest.bytes,
                )?;
            }
            images::get(c, &id)
        })?;
        failpoint::reach("commit_image.after_row");
        self.image_of(row.ok_or_else(|| no_image(&id))?)
    }

    /// The image of a name, protected by a lease from now on; `None` when it is not here or torn.
    ///
    /// # Errors
    /// As [`Store::resolve`]; [`StoreError::LeaseGone`].
    pub fn use_image(&self, name: &str, lease: &Lease) -> Result<Option<Image>> {
        let Some(image) = self.resolve(name)? else {
            return Ok(None);
        };
        Ok(if lease.image(&image.id)? {
            Some(image)
        } else {
            None
        })
    }
}

/// The image that runs best on a platform: else the first.
fn best(c: &rusqlite::Connection, ids: Vec<ImageId>, platform: &Platform) -> Result<Option<ImageId>> {
    if ids.len() < 2 {
        return Ok(ids.into_iter().next());
    }
    let mut ranked = Vec::with_capacity(ids.len());
    for (at, id) in ids.into_iter().enumerate() {
        let config = images::get(c, &id)?.map(|row| row.config).unwrap_or_default();
        let made_for = ConfigFacts::parse(&config)
            .ok()
            .and_then(|facts| facts.platform());
        let rank = made_for.and_then(|made_for| platform.rank(&made_for));
        ranked.push((rank.unwrap_or(u32::MAX), at, id));
    }
    Ok(ranked.into_iter().min().map(|(_, _, id)| id))
}

/// What a chain's layers take; fails when one is missing.
fn layers_usage(c: &rusqlite::Connection, chain: Option<&ChainId>) -> Result<Usage> {
    let Some(chain) = chain else {
        return Ok(Usage::default());
    };
    let all = layers::chain(c, chain)?.ok_or(StoreError::NoLayer { chain: *chain })?;
    Ok(all.into_iter().map(|layer| layer.usage).sum())
}

fn check_manifest(id: &ImageId, new: &NewImage<'_>, layers: usize) -> Result<()> {
    let Some(manifest) = &new.manifest else {
        return Ok(());
    };
    if manifest.layers.len() == layers {
        return Ok(());
    }
    let reason = format!("it has {layers} layers, its manifest {}", manifest.layers.len());
    Err(StoreError::BadConfig {
        id: *id.digest(),
        reason,
    })
}

/// Reads a configuration and the DiffIDs in it.
pub(crate) fn parse_config(id: &Digest, bytes: &[u8]) -> Result<(ImageConfiguration, Vec<DiffId>)> {
    let bad = |reason: String| StoreError::BadConfig { id: *id, reason };
    let config: ImageConfiguration = serde_json::from_slice(bytes).map_err(|e| bad(e.to_string()))?;
    if config.rootfs().typ() != "layers" {
        return Err(bad(format!(
            "its root filesystem is of type {:?}",
            config.rootfs().typ()
        )));
    }
    let diffs = config
        .rootfs()
        .diff_ids()
        .iter()
        .map(|diff| diff.parse::<DiffId>().map_err(|e| bad(e.to_string())))
        .collect::<Result<Vec<_>>>()?;
    Ok((config, diffs))
}

/// The text of a name: the catalog's key.
fn name_of(name: &Reference) -> Result<String> {
    if name.digest().is_some() {
        let reason = "it has a digest, and a digest names one image for ever".to_owned();
        return Err(StoreError::BadName {
            name: name.to_string(),
            reason,
        });
    }
    Ok(name.canonical().to_string())
}

fn parse_name(name: &str) -> Result<Reference> {
    Reference::parse(name).map_err(|e| StoreError::BadName {
        name: name.to_owned(),
        reason: e.to_string(),
    })
}

pub(crate) fn no_image(id: &ImageId) -> StoreError {
    StoreError::NoImage { name: id.to_string() }
}

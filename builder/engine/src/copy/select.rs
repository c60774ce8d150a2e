//! Which nodes a COPY's sources name: literal paths and wildcards, .dockerignore and --exclude
//! applied. Reads directories, never contents.

use std::path::{Path, PathBuf};

use rustix::fs::FileType;
use slipway_dockerfile::ignore::Matcher;

use super::tree::{Filter, Found, Tree, Verdict};
use super::{CopyError, glob};

/// The nodes that `path` names in `tree`: one for a literal path, those that match for a wildcard.
/// A wildcard component matches without following symlinks; what is named at the end is followed.
///
/// # Errors
/// When a literal path names nothing, or the part before a wildcard is not there.
pub fn resolve(tree: &Tree, path: &str) -> Result<Vec<Found>, CopyError> {
    if !glob::has_wildcard(path) {
        return Ok(vec![literal(tree, path)?]);
    }
    let (base, pattern) = glob::split(path);
    let base = literal(tree, &base)?;
    let parts: Vec<&str> = pattern.split('/').collect();
    let mut matches = Vec::new();
    expand(tree, &base.real, &parts, path, &mut matches)?;
    let mut found = Vec::new();
    for real in matches {
        // The match itself may be a symlink: what it points to is copied, under the match's name.
        if let Some(one) = tree.find(&real)? {
            found.push(one);
        }
    }
    Ok(found)
}

fn literal(tree: &Tree, path: &str) -> Result<Found, CopyError> {
    let place = || tree.name.clone();
    match tree.find(Path::new(path))? {
        Some(found) => Ok(found),
        None if tree.is_ignored(Path::new(path)) => Err(CopyError::Ignored {
            path: path.to_owned(),
            place: place(),
        }),
        None => Err(CopyError::NotFound {
            path: path.to_owned(),
            place: place(),
        }),
    }
}

fn expand(
    tree: &Tree,
    dir: &Path,
    parts: &[&str],
    pattern: &str,
    out: &mut Vec<PathBuf>,
) -> Result<(), CopyError> {
    let [first, rest @ ..] = parts else { return Ok(()) };
    for (name, stat) in tree.names(dir)? {
        let hit = glob::matches(first, &name.to_string_lossy()).map_err(|_| CopyError::BadPattern {
            pattern: pattern.to_owned(),
        })?;
        if !hit {
            continue;
        }
        let path = dir.join(&name);
        if rest.is_empty() {
            out.push(path);
        } else if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
            expand(tree, &path, rest, pattern, out)?;
        }
    }
    Ok(())
}

/// `--exclude` and `--parents`: patterns in the language of .dockerignore, relative to the source.
pub struct Patterns {
    /// What is taken; `None`: everything.
    pub include: Option<Matcher>,
    /// What is not.
    pub exclude: Option<Matcher>,
}

impl Filter for Patterns {
    fn take(&self, path: &Path) -> Verdict {
        let path = path.to_string_lossy();
        if let Some(exclude) = &self.exclude
            && exclude.matches_or_parent(&path)
        {
            return if exclude.skips_directory(&path) {
                Verdict::Skip
            } else {
                Verdict::Below
            };
        }
        match &self.include {
            Some(include) if !include.matches_or_parent(&path) => Verdict::Below,
            _ => Verdict::Take,
        }
    }
}

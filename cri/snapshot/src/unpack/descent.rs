//! What of the layers below shows through at one path of a layer after the other. What neighbours have in common is
//! looked up once, so that a row of sorted paths costs one look-up a directory, however deep they lie.

use super::tree::{join, split};
use crate::attributes::is_opaque;
use crate::lower::{Found, MergedDir, View};
use rustix::fs::OFlags;
use std::ffi::OsStr;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// A way down through a layer and what lies below it, remembered between calls. Nothing may make a directory on it
/// opaque meanwhile.
pub(super) struct Descent<'a> {
    own: &'a View,
    below: &'a View,
    path: Vec<u8>,
    /// One for each directory on the path: where its name ends, and what shows through in it.
    levels: Vec<(usize, MergedDir)>,
}

impl<'a> Descent<'a> {
    pub(super) fn new(own: &'a View, below: &'a View) -> Descent<'a> {
        Descent {
            own,
            below,
            path: Vec::new(),
            levels: Vec::new(),
        }
    }

    /// What is seen at a path of the layer, given the layer's opaque directories.
    pub(super) fn find(&mut self, path: &[u8]) -> io::Result<Found> {
        if path.is_empty() {
            return self.below.find(Path::new(""));
        }
        self.enter(split(path).0)?;
        match self.levels.last() {
            Some((_, dir)) => self.below.lookup(dir, as_path(path)),
            None => self.below.lookup(&self.below.root(), as_path(path)),
        }
    }

    /// Goes to a directory: up to what it shares with the last one, and down from there.
    fn enter(&mut self, dir: &[u8]) -> io::Result<()> {
        let shared = |end: usize| {
            dir.len() >= end && dir[..end] == self.path[..end] && matches!(dir.get(end), None | Some(b'/'))
        };
        while self.levels.last().is_some_and(|(end, _)| !shared(*end)) {
            self.levels.pop();
        }
        let start = self.levels.last().map_or(0, |(end, _)| *end);
        self.path = dir.to_vec();
        let rest = dir.get(start..).unwrap_or_default();
        for part in rest.split(|b| *b == b'/').filter(|part| !part.is_empty()) {
            let (here, above) = match self.levels.last() {
                Some((end, above)) => (join(&dir[..*end], part), above.clone()),
                None => (part.to_vec(), self.below.root()),
            };
            let merged = match self.below.lookup(&above, as_path(&here))? {
                Found::Directory { dir, .. } if !self.is_opaque(&here)? => dir,
                _ => MergedDir::default(),
            };
            self.levels.push((here.len(), merged));
        }
        Ok(())
    }

    fn is_opaque(&self, path: &[u8]) -> io::Result<bool> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW;
        match self.own.open_at(0, as_path(path), flags)? {
            Some(dir) => is_opaque(dir.as_fd()),
            None => Ok(false),
        }
    }
}

fn as_path(path: &[u8]) -> &Path {
    Path::new(OsStr::from_bytes(path))
}

//! The cache of glibc's loader (`/etc/ld.so.cache`): which files it names, and the same cache without some of them. Knows
//! nothing of where it is, and reads it as anything that comes from an image.
//!
//! ```text
//! [the format of before glibc 2.2, which loaders pass over]
//! header (48 bytes) ─ entries (24 bytes each, in the order in which the loader searches) ─ strings ─ extensions
//! ```
//! Offsets of strings count from the header, those of extensions from the beginning of the file. `cache.c` and `dl-cache.h`
//! of glibc have the format.

use std::collections::BTreeSet;
use std::ops::Range;

const OLD_MAGIC: &[u8] = b"ld.so-1.7.0\0";
const MAGIC: &[u8] = b"glibc-ld.so.cache1.1";
const EXTENSIONS: u32 = 0xeaa4_2174;
const HEADER: usize = 48;
const ENTRY: usize = 24;
/// Of an extension: its header, and that of each of its sections.
const SECTION: (usize, usize) = (8, 16);
/// A section that names the program; one of offsets of strings.
const GENERATOR: u32 = 0;
const HWCAPS: u32 = 1;

/// A cache that was understood.
#[derive(Debug)]
pub(crate) struct LoaderCache {
    bytes: Vec<u8>,
    entries: usize,
    strings: Range<usize>,
    /// Where they begin, and whose contents are offsets of strings.
    extensions: Option<(usize, Vec<Range<usize>>, Vec<usize>)>,
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    let word = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_le_bytes(word.try_into().ok()?))
}

fn offset(bytes: &[u8], at: usize) -> Option<usize> {
    usize::try_from(word(bytes, at)?).ok()
}

impl LoaderCache {
    /// Reads one; `None`: not in a format that is known.
    pub fn parse(mut bytes: Vec<u8>) -> Option<LoaderCache> {
        let mut old = 0;
        if bytes.starts_with(OLD_MAGIC) {
            old = offset(&bytes, 12)?
                .checked_mul(12)?
                .checked_add(16)?
                .checked_next_multiple_of(8)?;
            bytes.get(old..)?;
            bytes = bytes.split_off(old);
        }
        // Two of the flags say which order the bytes have; 0: that of the machine.
        if !bytes.starts_with(MAGIC) || !matches!(bytes.get(28)? & 3, 0 | 2) {
            return None;
        }
        let entries = offset(&bytes, 20)?;
        let start = entries.checked_mul(ENTRY)?.checked_add(HEADER)?;
        let strings = start..start.checked_add(offset(&bytes, 24)?)?;
        bytes.get(strings.clone())?;
        let extensions = match offset(&bytes, 32)? {
            0 => None,
            at => {
                let at = at.checked_sub(old).filter(|at| *at >= strings.end)?;
                Some(extensions(&mut bytes, at, old)?)
            }
        };
        let cache = LoaderCache {
            bytes,
            entries,
            strings,
            extensions,
        };
        let known = |at| cache.string(at).is_some();
        let names_known = (0..entries).flat_map(|entry| cache.names(entry)).all(known);
        (names_known && cache.hwcaps().all(known)).then_some(cache)
    }

    /// The files, by absolute paths, each as often as it is named.
    pub fn paths(&self) -> impl Iterator<Item = &str> {
        (0..self.entries).filter_map(|entry| self.string(self.names(entry)[1]))
    }

    /// The same without the files that are `gone`; the bytes that the loader's own program would have written.
    pub fn without(&self, gone: &BTreeSet<String>) -> Option<Vec<u8>> {
        let stays = |entry: &usize| {
            self.string(self.names(*entry)[1])
                .is_none_or(|path| !gone.contains(path))
        };
        let entries: Vec<usize> = (0..self.entries).filter(stays).collect();
        let used: BTreeSet<usize> = entries
            .iter()
            .flat_map(|entry| self.names(*entry))
            .chain(self.hwcaps())
            .collect();
        let start = HEADER + entries.len() * ENTRY;
        let (mut strings, mut moved) = (Vec::new(), Vec::new());
        let mut at = self.strings.start;
        for text in self.bytes[self.strings.clone()].split_inclusive(|byte| *byte == 0) {
            let end = at + text.len();
            // Strings that end alike share their end.
            if let Some(first) = used.range(at..end).next() {
                moved.push((*first, start + strings.len()));
                strings.extend(&self.bytes[*first..end]);
            }
            at = end;
        }
        let place = |old: usize| -> Option<[u8; 4]> {
            let (from, to) = *moved.get(moved.partition_point(|(from, _)| *from <= old).checked_sub(1)?)?;
            Some(u32::try_from(to + old - from).ok()?.to_le_bytes())
        };
        let mut new = self.bytes[..HEADER].to_vec();
        new[20..24].copy_from_slice(&u32::try_from(entries.len()).ok()?.to_le_bytes());
        new[24..28].copy_from_slice(&u32::try_from(strings.len()).ok()?.to_le_bytes());
        for entry in entries {
            let from = HEADER + entry * ENTRY;
            let [key, value] = self.names(entry);
            new.extend(&self.bytes[from..from + 4]);
            new.extend(place(key)?);
            new.extend(place(value)?);
            new.extend(&self.bytes[from + 12..from + ENTRY]);
        }
        new.extend(&strings);
        if let Some((old, lists, sections)) = &self.extensions {
            new.resize(new.len().next_multiple_of(4), 0);
            let at = new.len();
            new[32..36].copy_from_slice(&u32::try_from(at).ok()?.to_le_bytes());
            new.extend(&self.bytes[*old..]);
            for section in sections {
                let moved = u32::try_from(offset(&self.bytes, *section)? - old + at).ok()?;
                new[section - old + at..][..4].copy_from_slice(&moved.to_le_bytes());
            }
            for word in lists.iter().flat_map(|list| list.clone().step_by(4)) {
                new[word - old + at..][..4].copy_from_slice(&place(offset(&self.bytes, word)?)?);
            }
        }
        Some(new)
    }

    /// Where an entry's name and path are; past the end where the cache does not say so.
    fn names(&self, entry: usize) -> [usize; 2] {
        let from = HEADER + entry * ENTRY;
        [from + 4, from + 8].map(|at| offset(&self.bytes, at).unwrap_or(usize::MAX))
    }

    fn hwcaps(&self) -> impl Iterator<Item = usize> {
        let lists = self.extensions.iter().flat_map(|(_, lists, _)| lists.clone());
        lists
            .flat_map(|list| list.step_by(4))
            .map(|at| offset(&self.bytes, at).unwrap_or(usize::MAX))
    }

    fn string(&self, at: usize) -> Option<&str> {
        // No path is longer: what is none costs no more.
        let text = self
            .strings
            .contains(&at)
            .then(|| &self.bytes[at..self.strings.end])?;
        let end = text.iter().take(4096).position(|byte| *byte == 0)?;
        std::str::from_utf8(&text[..end]).ok()
    }
}

/// Where the extensions are, where lists of strings are in them, and where they say where a section is: from here on without
/// the `old` bytes before.
fn extensions(bytes: &mut [u8], at: usize, old: usize) -> Option<(usize, Vec<Range<usize>>, Vec<usize>)> {
    if word(bytes, at)? != EXTENSIONS {
        return None;
    }
    let (mut lists, mut sections) = (Vec::new(), Vec::new());
    for section in 0..offset(bytes, at.checked_add(4)?)? {
        let header = section
            .checked_mul(SECTION.1)?
            .checked_add(at)?
            .checked_add(SECTION.0)?;
        let from = offset(bytes, header.checked_add(8)?)?.checked_sub(old)?;
        let content = from..from.checked_add(offset(bytes, header.checked_add(12)?)?)?;
        if content.start < at {
            return None;
        }
        bytes.get(content.clone())?;
        match word(bytes, header)? {
            GENERATOR => {}
            HWCAPS if content.len() % 4 == 0 => lists.push(content),
            _ => return None,
        }
        bytes[header + 8..][..4].copy_from_slice(&u32::try_from(from).ok()?.to_le_bytes());
        sections.push(header + 8);
    }
    Some((at, lists, sections))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;
    use std::path::{Path, PathBuf};
    use std::process::Command;

    fn ldconfig() -> Option<PathBuf> {
        // Its own root keeps it from this machine's libraries.
        if !crate::tests_as_root::is_root() {
            return None;
        }
        let found = ["/sbin/ldconfig.real", "/sbin/ldconfig", "/usr/sbin/ldconfig"];
        let found = found.into_iter().map(PathBuf::from).find(|p| p.exists());
        if found.is_none() {
            let _ = writeln!(std::io::stderr(), "SKIPPED: there is no ldconfig");
        }
        found
    }

    /// Two folders, with a copy of a library of this machine's each.
    const FOLDERS: [&str; 2] = ["/own", "/driver"];

    fn libraries(root: &Path) -> Option<()> {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let mut libraries: Vec<&str> = maps
            .lines()
            .filter_map(|l| l.split_whitespace().nth(5))
            .filter(|p| p.contains(".so"))
            .collect();
        libraries.dedup();
        let [a, b, ..] = libraries[..] else {
            let _ = writeln!(std::io::stderr(), "SKIPPED: a program without libraries");
            return None;
        };
        std::fs::create_dir(root.join("etc")).unwrap();
        for (folder, library) in FOLDERS.into_iter().zip([a, b]) {
            let folder = root.join(&folder[1..]);
            std::fs::create_dir(&folder).unwrap();
            std::fs::copy(library, folder.join(Path::new(library).file_name().unwrap())).unwrap();
        }
        Some(())
    }

    fn made(ldconfig: &Path, root: &Path, format: &str, folders: &[&str]) -> Vec<u8> {
        std::fs::write(root.join("etc/ld.so.conf"), folders.join("\n") + "\n").unwrap();
        let mut command = Command::new(ldconfig);
        let ran = command
            .args(["-X", "-c", format, "-r"])
            .arg(root)
            .output()
            .unwrap();
        assert!(ran.status.success(), "{ran:?}");
        std::fs::read(root.join("etc/ld.so.cache")).unwrap()
    }

    #[test]
    fn a_cache_without_some_files_is_what_ldconfig_makes_where_they_are_not() {
        let dir = tempfile::tempdir().unwrap();
        let (Some(ldconfig), Some(())) = (ldconfig(), libraries(dir.path())) else {
            return;
        };
        for format in ["new", "compat"] {
            let both = made(&ldconfig, dir.path(), format, &FOLDERS);
            let cache = LoaderCache::parse(both).unwrap();
            let of_driver = |path: &&str| Path::new(path).starts_with(FOLDERS[1]);
            let gone: BTreeSet<String> = cache.paths().filter(of_driver).map(str::to_owned).collect();
            assert!(!gone.is_empty(), "{cache:?}");
            let without = cache.without(&gone).unwrap();
            let own = made(&ldconfig, dir.path(), "new", &FOLDERS[..1]);
            assert_eq!(without.len(), own.len(), "{format}");
            assert!(without == own, "{format}");
            let again = LoaderCache::parse(without).unwrap();
            assert_eq!(again.paths().filter(of_driver).count(), 0);
            assert!(again.without(&BTreeSet::new()).unwrap() == own);
        }
    }

    #[test]
    fn what_is_no_cache_is_not_understood_and_does_no_harm() {
        for bytes in [
            &b""[..],
            b"glibc-ld.so.cache1.1",
            b"ld.so-1.7.0\0\xff\xff\xff\xff",
            b"\x7fELF",
        ] {
            assert!(LoaderCache::parse(bytes.to_vec()).is_none(), "{bytes:?}");
        }
        let dir = tempfile::tempdir().unwrap();
        let (Some(ldconfig), Some(())) = (ldconfig(), libraries(dir.path())) else {
            return;
        };
        for format in ["new", "compat"] {
            let whole = made(&ldconfig, dir.path(), format, &FOLDERS);
            for at in 0..whole.len() {
                for bytes in [whole[..at].to_vec(), {
                    let mut bytes = whole.clone();
                    bytes[at] ^= 0xff;
                    bytes
                }] {
                    if let Some(cache) = LoaderCache::parse(bytes) {
                        let one = cache.paths().take(1).map(str::to_owned).collect();
                        drop(cache.without(&one));
                    }
                }
            }
        }
    }
}

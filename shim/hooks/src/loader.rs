//! The container's dynamic loader: how it is configured, and where it looks by itself.

use std::collections::{BTreeSet, VecDeque};
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::Path;

use rustix::fs::{FileType, OFlags};
use slipway_sys::root::Root;

/// The loader's configuration, and the folder of its parts.
pub const CONFIGURATION: &str = "/etc/ld.so.conf";
/// See [`CONFIGURATION`].
pub const PARTS: &str = "/etc/ld.so.conf.d";

/// A configuration file larger than this is not read, nor are more of them.
const MAX_FILE: usize = 64 << 10;
const MAX_FILES: usize = 256;

/// Writes a part of the configuration: a folder a line. In byte order of their names the parts say who comes first.
pub fn write_part(root: &Root, name: &str, folders: &[String]) -> std::io::Result<()> {
    use std::io::Write as _;
    if folders.is_empty() {
        return Ok(());
    }
    root.mkdir_all(Path::new(PARTS), 0o755, None)?;
    let mut text = folders.join("\n");
    text.push('\n');
    root.create_file(&Path::new(PARTS).join(name), 0o644)?
        .write_all(text.as_bytes())
}

/// Gives a container without a configuration one that reads the parts.
pub fn ensure_configuration(root: &Root) -> std::io::Result<()> {
    use std::io::Write as _;
    if root.symlink_metadata(Path::new(CONFIGURATION))?.is_some() {
        return Ok(());
    }
    root.mkdir_all(Path::new("/etc"), 0o755, None)?;
    root.create_file(Path::new(CONFIGURATION), 0o644)?
        .write_all(format!("include {PARTS}/*.conf\n").as_bytes())
}

/// The folders that the configuration names, as far as it can be read: it is the image's.
pub fn configured(root: &Root) -> BTreeSet<String> {
    let mut folders = BTreeSet::new();
    let mut seen = BTreeSet::new();
    let mut files = VecDeque::from([CONFIGURATION.to_owned()]);
    while let Some(file) = files.pop_front() {
        if seen.len() >= MAX_FILES || !seen.insert(file.clone()) {
            continue;
        }
        let Ok(Some(text)) = root.read(Path::new(&file), MAX_FILE) else {
            continue;
        };
        for line in String::from_utf8_lossy(&text).lines() {
            let line = line.split('#').next().unwrap_or_default().trim();
            match line.split_once(char::is_whitespace) {
                Some(("include", pattern)) => files.extend(matching(root, pattern.trim())),
                _ if line.starts_with('/') => drop(folders.insert(line.to_owned())),
                _ => {}
            }
        }
    }
    folders
}

/// The files that a pattern names, when it has its stars in the file's name only, as everybody writes it.
fn matching(root: &Root, pattern: &str) -> Vec<String> {
    let Some((dir, name)) = pattern.rsplit_once('/') else {
        return Vec::new();
    };
    // Relative to the file that names it, which is in /etc.
    let dir = if dir.starts_with('/') {
        dir.to_owned()
    } else {
        format!("/etc/{dir}")
    };
    let mut names = names_in(root, Path::new(&dir), MAX_FILES).unwrap_or_default();
    names.retain(|n| n.to_str().is_some_and(|n| matches(name.as_bytes(), n.as_bytes())));
    names.sort();
    let join = |n: OsString| format!("{dir}/{}", n.to_string_lossy());
    names.into_iter().map(join).collect()
}

/// Whether a name is one that a pattern with `*` and `?` means.
fn matches(pattern: &[u8], name: &[u8]) -> bool {
    let (mut p, mut n) = (0, 0);
    // The last star, and how much of the name it stands for so far.
    let mut star: Option<(usize, usize)> = None;
    while n < name.len() {
        match pattern.get(p) {
            Some(b'*') => {
                star = Some((p, n));
                p += 1;
            }
            Some(c) if *c == b'?' || *c == name[n] => (p, n) = (p + 1, n + 1),
            _ => match star {
                Some((at, taken)) => {
                    star = Some((at, taken + 1));
                    (p, n) = (at + 1, taken + 1);
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|c| *c == b'*')
}

/// The names in a directory of the container's, at most so many.
pub fn names_in(root: &Root, dir: &Path, at_most: usize) -> std::io::Result<Vec<OsString>> {
    let dir = root.open_file(dir, OFlags::RDONLY | OFlags::DIRECTORY)?;
    let mut names = Vec::new();
    for entry in rustix::fs::Dir::read_from(&dir)? {
        let name = entry?.file_name().to_bytes().to_vec();
        if name != b"." && name != b".." {
            names.push(OsString::from_vec(name));
        }
        if names.len() >= at_most {
            break;
        }
    }
    Ok(names)
}

/// Where the container's loader looks by itself. The host's `ldconfig` looks elsewhere when the host is of another
/// family.
pub fn system_folders(root: &Root) -> Vec<String> {
    let arch = std::env::consts::ARCH;
    let mut folders = Vec::new();
    if is_file(root, "/etc/debian_version") {
        folders.push(format!("/lib/{arch}-linux-gnu"));
        folders.push(format!("/usr/lib/{arch}-linux-gnu"));
    } else {
        folders.extend(["/lib64", "/usr/lib64"].map(str::to_owned));
    }
    folders.extend(["/lib", "/usr/lib"].map(str::to_owned));
    folders
}

/// The musl loader has a list of its own, and no cache.
pub fn write_musl(root: &Root, folders: &[String]) -> std::io::Result<()> {
    use std::io::Write as _;
    let arch = std::env::consts::ARCH;
    let is_musl = is_file(root, "/etc/alpine-release") || is_file(root, &format!("/lib/ld-musl-{arch}.so.1"));
    if !is_musl {
        return Ok(());
    }
    let path = format!("/etc/ld-musl-{arch}.path");
    // With a list it no longer looks where it does without.
    let there = match root.read(Path::new(&path), MAX_FILE)? {
        Some(text) => String::from_utf8_lossy(&text).into_owned(),
        None => "/lib\n/usr/local/lib\n/usr/lib\n".to_owned(),
    };
    let mut lines: Vec<&str> = there.split(['\n', ':']).filter(|l| !l.is_empty()).collect();
    for folder in folders {
        if !lines.contains(&folder.as_str()) {
            lines.push(folder);
        }
    }
    let mut text = lines.join("\n");
    text.push('\n');
    root.create_file(Path::new(&path), 0o644)?
        .write_all(text.as_bytes())
}

fn is_file(root: &Root, path: &str) -> bool {
    let stat = root.metadata(Path::new(path)).ok().flatten();
    stat.is_some_and(|s| FileType::from_raw_mode(s.st_mode) == FileType::RegularFile)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stars_and_question_marks_match_as_a_shell_has_them() {
        for (pattern, name, wanted) in [
            ("*.conf", "a.conf", true),
            ("*.conf", ".conf", true),
            ("*.conf", "a.conf.bak", false),
            ("a?c*", "abc", true),
            ("a?c", "ac", false),
            ("", "", true),
            ("*", "", true),
            ("*a*b*", "xaybz", true),
            ("*a*b", "xaybz", false),
        ] {
            assert_eq!(
                matches(pattern.as_bytes(), name.as_bytes()),
                wanted,
                "{pattern} {name}"
            );
        }
        // One that makes a simple matcher take for ever.
        let name = "a".repeat(255);
        assert!(!matches("*a".repeat(30_000).as_bytes(), name.as_bytes()));
    }
}

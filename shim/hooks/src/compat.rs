//! `enable-cuda-compat`: an image that brings a libcuda newer than the driver's gets to use it, where the driver can run it.
//!
//! The library's own note decides, where it has one; else its driver's version has to be a higher one.

use std::cmp::Ordering;
use std::path::Path;

use rustix::fs::OFlags;
use slipway_sys::root::Root;

use crate::args::Compat;
use crate::elf::{self, Note};
use crate::{Step, loader, step};

/// Before the driver's folders.
const PART: &str = "00-compat-slipway.conf";
const LIBRARY: &str = "libcuda.so.";

/// Names the image's folder to the loader, when its library is to be used.
pub fn enable(root: &Root, wanted: &Compat) -> Step<()> {
    let Some((folder, version)) = find(root, Path::new(&wanted.folder)) else {
        return Ok(());
    };
    let path = Path::new(&folder).join(format!("{LIBRARY}{version}"));
    let file = root.open_file(&path, OFlags::RDONLY | OFlags::NONBLOCK);
    let file = file.map_err(step(format!("open the image's {}", path.display())))?;
    let is_file = file.metadata().is_ok_and(|m| m.is_file());
    if is_file && is_better(elf::note(file).as_ref(), &version, wanted) {
        loader::write_part(root, PART, &[folder]).map_err(step("name the image's libcuda to the loader"))?;
    }
    Ok(())
}

/// The folder, with its links resolved, and the version of the one libcuda in it.
fn find(root: &Root, folder: &Path) -> Option<(String, String)> {
    let folder = root.resolve(folder).ok()?;
    let names = loader::names_in(root, &folder, 4096).ok()?;
    let versions = names
        .iter()
        .filter_map(|n| n.to_str()?.strip_prefix(LIBRARY))
        .filter(|v| v.contains('.') && parse(v).is_some());
    let versions: Vec<&str> = versions.collect();
    let [version] = versions[..] else { return None };
    let folder = folder.to_str().filter(|f| !f.chars().any(char::is_control))?;
    Some((folder.to_owned(), version.to_owned()))
}

fn is_better(note: Option<&Note>, version: &str, wanted: &Compat) -> bool {
    let ours = parse(version);
    let driver = wanted.driver.as_deref().and_then(parse);
    let cuda = wanted.cuda.as_deref().and_then(parse);
    match (note, ours, driver) {
        (Some(note), Some(ours), Some(driver)) => {
            note.drivers.contains(&driver[0]) && ours.cmp(&driver) == Ordering::Greater
        }
        (Some(note), ..) => match (parse(&note.cuda), cuda) {
            (Some(brings), Some(can)) => brings > can,
            _ => false,
        },
        // Asked to compare CUDA's version, which only a note has.
        (None, ..) if wanted.cuda.is_some() => false,
        (None, Some(ours), Some(driver)) => ours[0] > driver[0],
        (None, ..) => false,
    }
}

/// "570.86.15" as numbers that compare; at most three, missing ones are 0.
fn parse(version: &str) -> Option<[u64; 3]> {
    let mut numbers = [0; 3];
    let parts: Vec<&str> = version.split('.').collect();
    if parts.len() > numbers.len() {
        return None;
    }
    for (number, part) in numbers.iter_mut().zip(parts) {
        if part.is_empty() || !part.bytes().all(|b| b.is_ascii_digit()) {
            return None;
        }
        *number = part.parse().ok()?;
    }
    Some(numbers)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(driver: &str, cuda: &str) -> Compat {
        let given = |s: &str| Some(s.to_owned()).filter(|s| !s.is_empty());
        Compat {
            driver: given(driver),
            cuda: given(cuda),
            folder: "/usr/local/cuda/compat".to_owned(),
        }
    }

    #[test]
    fn without_a_note_the_major_version_decides() {
        assert!(is_better(None, "570.86.15", &asked("535.104.05", "")));
        assert!(!is_better(None, "535.183.1", &asked("535.104.05", "")));
        assert!(!is_better(None, "520.1", &asked("535.104.05", "")));
        assert!(!is_better(None, "570.86.15", &asked("", "")));
        assert!(!is_better(None, "570.86.15", &asked("535.104.05", "12.2")));
    }

    #[test]
    fn a_note_says_on_which_drivers_it_runs() {
        let note = Note {
            cuda: "12.8".into(),
            drivers: vec![535, 550],
        };
        let note = Some(&note);
        assert!(is_better(note, "570.86.15", &asked("535.104.05", "12.2")));
        assert!(
            !is_better(note, "570.86.15", &asked("525.1", "12.0")),
            "a driver that it does not name"
        );
        assert!(
            !is_better(note, "535.86.15", &asked("535.104.05", "12.2")),
            "an older one"
        );
        assert!(is_better(note, "570.86.15", &asked("", "12.2")));
        assert!(!is_better(note, "570.86.15", &asked("", "12.10")));
        assert!(!is_better(note, "570.86.15", &asked("", "")));
    }
}

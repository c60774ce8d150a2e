//! The file in the CDI folder: written whole and durable before anyone sees it, left alone when nothing changed.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;

use slipway_cdi::Spec;

/// The file's name.
pub const FILE_NAME: &str = "slipway-gpu.json";
/// While it is written: no name that a runtime would read.
const NEW_NAME: &str = ".slipway-gpu.json.new";

/// Writes the file into `folder`, which is made; whether it was another one before.
///
/// # Errors
/// The folder cannot be made or written; the file before is as it was.
pub fn write(spec: &Spec, folder: &Path) -> io::Result<bool> {
    let mut text = serde_json::to_vec_pretty(spec)?;
    text.push(b'\n');
    let path = folder.join(FILE_NAME);
    if fs::read(&path).is_ok_and(|old| old == text) {
        return Ok(false);
    }
    fs::create_dir_all(folder)?;
    let new = folder.join(NEW_NAME);
    // Whatever lies there is not written through, be it a link.
    match fs::remove_file(&new) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o644)
        .open(&new)?;
    let written = file
        .set_permissions(fs::Permissions::from_mode(0o644))
        .and_then(|()| file.write_all(&text))
        .and_then(|()| file.sync_all())
        .and_then(|()| fs::rename(&new, &path));
    if written.is_err() {
        let _ = fs::remove_file(&new);
    }
    written?;
    fs::File::open(folder)?.sync_all()?;
    Ok(true)
}

/// Removes the file: its devices are gone. Not there: fine.
///
/// # Errors
/// It cannot be removed.
pub fn remove(folder: &Path) -> io::Result<()> {
    match fs::remove_file(folder.join(FILE_NAME)) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

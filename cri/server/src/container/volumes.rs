//! Anonymous volumes: what an image's VOLUMEs become in each container.
//!
//! ```text
//! <root>/volumes/<container id>/  0700
//!   0 1 2 …                       one a VOLUME, filled with what the image has there
//! ```
//! The image is hostile: its paths are resolved inside its rootfs (openat2), and the copy goes from directory descriptor
//! to directory descriptor without ever following a link (CVE-2022-23648).

use std::ffi::OsStr;
use std::fs::DirBuilder;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, Stat, Timestamps, Uid};
use slipway_image::Image;
use slipway_snapshot::{Root, Usage};
use slipway_spec::ImageDefaults;

use super::Container;
use crate::error::Error;
use crate::ids::ContainerId;

/// Bounds what the volumes of a container may copy: entries, and depth. Bytes are the configuration's.
const MAX_ENTRIES: usize = 1_000_000;
const MAX_DEPTH: usize = 256;

/// What may still be copied.
struct Allowance {
    entries: usize,
    bytes: u64,
    limit: u64,
}

impl Allowance {
    fn new(limit: u64) -> Allowance {
        Allowance {
            entries: MAX_ENTRIES,
            bytes: limit,
            limit,
        }
    }

    fn entry(&mut self) -> std::io::Result<()> {
        self.entries = self
            .entries
            .checked_sub(1)
            .ok_or_else(|| too_much("more than a million files"))?;
        Ok(())
    }

    fn bytes(&mut self, bytes: u64) -> std::io::Result<()> {
        self.bytes = self.bytes.checked_sub(bytes).ok_or_else(|| {
            too_much(&format!(
                "more than {} MiB (runtime.volume_copy_limit_mib); mount something there, or raise the limit",
                self.limit >> 20
            ))
        })?;
        Ok(())
    }
}

fn too_much(what: &str) -> std::io::Error {
    std::io::Error::new(
        std::io::ErrorKind::QuotaExceeded,
        format!("the image's volumes hold {what}"),
    )
}

/// Makes the volumes of the image that no mount of the container covers; they are mounts then.
pub fn make(
    volumes: &Path,
    container: &Container,
    image: &Image,
    mounts: &[slipway_spec::Mount],
    rootfs: &Path,
    limit: u64,
) -> Result<Vec<slipway_spec::Mount>, Error> {
    let wanted = slipway_spec::volumes(&ImageDefaults::from_config(&image.config), mounts)
        .map_err(Error::spec(container.id()))?;
    let (mut made, mut allowance) = (Vec::new(), Allowance::new(limit));
    for (number, path) in wanted.iter().enumerate() {
        let dir = volumes.join(container.id().as_str()).join(number.to_string());
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&dir)
            .map_err(Error::io("create", &dir))?;
        fill(rootfs, path, &dir, &mut allowance)?;
        made.push(slipway_spec::Mount {
            container_path: path.to_string_lossy().into_owned(),
            host_path: dir,
            ..Default::default()
        });
    }
    Ok(made)
}

/// Removes a container's volumes. None is fine.
pub fn remove(volumes: &Path, id: &ContainerId) -> Result<(), Error> {
    let dir = volumes.join(id.as_str());
    slipway_snapshot::remove_tree(&dir).map_err(Error::io("remove", dir))
}

/// Copies what the image has at `path`, with owner, mode, times, links and extended attributes.
fn fill(rootfs: &Path, path: &Path, to: &Path, left: &mut Allowance) -> Result<(), Error> {
    let failed =
        |error: std::io::Error| Error::io("copy the image's content into the volume for", path)(error);
    let root = Root::open(rootfs).map_err(failed)?;
    let found = root.metadata(path).map_err(failed)?;
    let Some(stat) = found.filter(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Directory) else {
        // The mount point is made when the container is.
        return std::fs::set_permissions(to, std::os::unix::fs::PermissionsExt::from_mode(0o755))
            .map_err(failed);
    };
    let from = root
        .open_file(path, OFlags::RDONLY | OFlags::DIRECTORY)
        .map_err(failed)?;
    let into = rustix::fs::open(
        to,
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .map_err(|errno| failed(errno.into()))?;
    copy_dir(from.as_fd(), into.as_fd(), &stat, MAX_DEPTH, left).map_err(failed)
}

/// Copies the entries of one directory, then its own properties.
fn copy_dir(
    from: BorrowedFd<'_>,
    to: BorrowedFd<'_>,
    stat: &Stat,
    depth: usize,
    left: &mut Allowance,
) -> std::io::Result<()> {
    if depth == 0 {
        return Err(std::io::Error::other("directories nested too deep"));
    }
    for entry in rustix::fs::Dir::read_from(from)? {
        let entry = entry?;
        let name = OsStr::from_bytes(entry.file_name().to_bytes());
        if name == "." || name == ".." {
            continue;
        }
        left.entry()?;
        copy_entry(from, to, name, depth, left)?;
    }
    copy_properties(from, to, stat)
}

fn copy_entry(
    from: BorrowedFd<'_>,
    to: BorrowedFd<'_>,
    name: &OsStr,
    depth: usize,
    left: &mut Allowance,
) -> std::io::Result<()> {
    let stat = rustix::fs::statat(from, name, AtFlags::SYMLINK_NOFOLLOW)?;
    let private = Mode::RUSR | Mode::WUSR | Mode::XUSR;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => {
            rustix::fs::mkdirat(to, name, private)?;
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let from = rustix::fs::openat(from, name, flags, Mode::empty())?;
            let to = rustix::fs::openat(to, name, flags, Mode::empty())?;
            copy_dir(from.as_fd(), to.as_fd(), &stat, depth - 1, left)
        }
        FileType::RegularFile => {
            let source = open_regular(from, name)?;
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let target = rustix::fs::openat(to, name, flags, private)?;
            let (mut reader, mut writer) = (std::fs::File::from(source), std::fs::File::from(target));
            copy_content(&mut reader, &mut writer, &stat, left)?;
            copy_properties(reader.as_fd(), writer.as_fd(), &stat)
        }
        FileType::Symlink => {
            let target = rustix::fs::readlinkat(from, name, Vec::new())?;
            rustix::fs::symlinkat(target, to, name)?;
            chown_entry(to, name, &stat)
        }
        kind => {
            rustix::fs::mknodat(to, name, kind, Mode::from_raw_mode(stat.st_mode), stat.st_rdev)?;
            chown_entry(to, name, &stat)
        }
    }
}

/// Copies what a file holds and not its holes, which would take the disk for nothing. The kernel shares the blocks where
/// the file system can.
fn copy_content(
    from: &mut std::fs::File,
    to: &mut std::fs::File,
    stat: &Stat,
    left: &mut Allowance,
) -> std::io::Result<()> {
    use std::io::{Read as _, Seek as _, SeekFrom as From};
    let size = u64::try_from(stat.st_size).unwrap_or(0);
    to.set_len(size)?;
    let mut at = 0;
    while at < size {
        let data = match rustix::fs::seek(&*from, rustix::fs::SeekFrom::Data(at)) {
            Ok(data) => data,
            // Nothing but a hole is left.
            Err(rustix::io::Errno::NXIO) => break,
            // The file system knows no holes.
            Err(rustix::io::Errno::INVAL) => at,
            Err(errno) => return Err(errno.into()),
        };
        let end = match rustix::fs::seek(&*from, rustix::fs::SeekFrom::Hole(data)) {
            Ok(end) => end.min(size),
            Err(_) => size,
        };
        left.bytes(end - data)?;
        from.seek(From::Start(data))?;
        to.seek(From::Start(data))?;
        let copied = std::io::copy(&mut from.take(end - data), to)?;
        if copied < end - data {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        at = end;
    }
    Ok(())
}

/// What a container's volumes take of the disk. None is nothing.
pub fn usage(volumes: &Path, id: &ContainerId) -> Result<Usage, Error> {
    let dir = volumes.join(id.as_str());
    match slipway_snapshot::tree_usage(&dir) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Usage::default()),
        counted => counted.map_err(Error::io("count", dir)),
    }
}

fn open_regular(dir: BorrowedFd<'_>, name: &OsStr) -> std::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(dir, name, flags, Mode::empty())?)
}

fn chown_entry(dir: BorrowedFd<'_>, name: &OsStr, stat: &Stat) -> std::io::Result<()> {
    Ok(rustix::fs::chownat(
        dir,
        name,
        owner(stat).0,
        owner(stat).1,
        AtFlags::SYMLINK_NOFOLLOW,
    )?)
}

fn owner(stat: &Stat) -> (Option<Uid>, Option<Gid>) {
    (Some(Uid::from_raw(stat.st_uid)), Some(Gid::from_raw(stat.st_gid)))
}

/// Owner first: it clears setuid bits and capabilities, which come after.
fn copy_properties(from: BorrowedFd<'_>, to: BorrowedFd<'_>, stat: &Stat) -> std::io::Result<()> {
    rustix::fs::fchown(to, owner(stat).0, owner(stat).1)?;
    rustix::fs::fchmod(to, Mode::from_raw_mode(stat.st_mode))?;
    copy_xattrs(from, to)?;
    let time = |seconds, nanoseconds| rustix::fs::Timespec {
        tv_sec: seconds,
        tv_nsec: nanoseconds,
    };
    let times = Timestamps {
        last_access: time(stat.st_atime, stat.st_atime_nsec as _),
        last_modification: time(stat.st_mtime, stat.st_mtime_nsec as _),
    };
    Ok(rustix::fs::futimens(to, &times)?)
}

fn copy_xattrs(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> std::io::Result<()> {
    let mut names = vec![0u8; 64 << 10];
    let length = match rustix::fs::flistxattr(from, &mut names[..]) {
        Ok(length) => length,
        Err(rustix::io::Errno::OPNOTSUPP) => return Ok(()),
        Err(errno) => return Err(errno.into()),
    };
    let mut value = vec![0u8; 64 << 10];
    for name in names[..length]
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty())
    {
        let length = rustix::fs::fgetxattr(from, name, &mut value[..])?;
        match rustix::fs::fsetxattr(to, name, &value[..length], rustix::fs::XattrFlags::empty()) {
            Ok(()) | Err(rustix::io::Errno::OPNOTSUPP) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    #[test]
    fn the_images_content_is_copied_with_links_modes_and_times() {
        let (rootfs, volume) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let data = rootfs.path().join("data");
        std::fs::create_dir_all(data.join("sub")).unwrap();
        std::fs::write(data.join("sub/file"), "content").unwrap();
        std::fs::set_permissions(data.join("sub/file"), std::fs::Permissions::from_mode(0o640)).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", data.join("link")).unwrap();
        let old = std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000);
        std::fs::File::open(data.join("sub/file"))
            .unwrap()
            .set_modified(old)
            .unwrap();

        fill(
            rootfs.path(),
            Path::new("/data"),
            volume.path(),
            &mut Allowance::new(1 << 20),
        )
        .unwrap();
        let file = volume.path().join("sub/file");
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "content");
        assert_eq!(file.metadata().unwrap().mode() & 0o7777, 0o640);
        assert_eq!(file.metadata().unwrap().modified().unwrap(), old);
        assert_eq!(
            std::fs::read_link(volume.path().join("link")).unwrap(),
            Path::new("/etc/passwd")
        );
    }

    #[test]
    fn a_volume_that_is_a_link_out_of_the_image_copies_nothing_of_the_host() {
        let (rootfs, volume) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let outside = tempfile::tempdir().unwrap();
        std::fs::write(outside.path().join("secret"), "x").unwrap();
        std::os::unix::fs::symlink(outside.path(), rootfs.path().join("data")).unwrap();
        fill(
            rootfs.path(),
            Path::new("/data"),
            volume.path(),
            &mut Allowance::new(1 << 20),
        )
        .unwrap();
        assert_eq!(std::fs::read_dir(volume.path()).unwrap().count(), 0);
    }

    #[test]
    fn more_bytes_than_allowed_are_refused_and_holes_cost_nothing() {
        let (rootfs, volume) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let data = rootfs.path().join("data");
        std::fs::create_dir(&data).unwrap();
        let sparse = std::fs::File::create(data.join("a")).unwrap();
        sparse.set_len(1 << 40).unwrap();
        std::os::unix::fs::FileExt::write_at(&sparse, b"end", (1 << 40) - 3).unwrap();
        fill(
            rootfs.path(),
            Path::new("/data"),
            volume.path(),
            &mut Allowance::new(1 << 20),
        )
        .unwrap();
        let copied = volume.path().join("a").metadata().unwrap();
        assert_eq!(copied.len(), 1 << 40);
        assert!(copied.blocks() * 512 < 1 << 20, "{} blocks", copied.blocks());

        std::fs::remove_file(volume.path().join("a")).unwrap();
        std::fs::write(data.join("b"), vec![1; 2 << 20]).unwrap();
        let error = fill(
            rootfs.path(),
            Path::new("/data"),
            volume.path(),
            &mut Allowance::new(1 << 20),
        );
        let text = error.unwrap_err().chain();
        assert!(
            text.contains("1 MiB") && text.contains("volume_copy_limit_mib"),
            "{text}"
        );
    }
}

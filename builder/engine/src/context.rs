//! The build context: where its files are, what its .dockerignore hides, and the Dockerfile's text.
//! Knows nothing of what instructions do with them.

use std::ffi::OsStr;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use slipway_dockerfile::ignore::{self, Matcher, PatternError};
use slipway_snapshot::Root;

use crate::request::{ContextSource, DockerfileSource};

/// A Dockerfile larger than this is refused before it is read into memory.
const DOCKERFILE_LIMIT: u64 = 16 << 20;

/// Why a context cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ContextError {
    /// The context is not a directory.
    #[error("the build context {} is not a directory", path.display())]
    NotADirectory {
        /// As given.
        path: PathBuf,
    },
    /// The context cannot be opened.
    #[error("cannot open the build context {}", path.display())]
    Open {
        /// As given.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// There is no Dockerfile.
    #[error("there is no {}{}", path.display(), suggestion(near))]
    NoDockerfile {
        /// Where it was looked for.
        path: PathBuf,
        /// Files beside it whose names are near.
        near: Vec<String>,
    },
    /// The Dockerfile or .dockerignore is a link to what is not in the context.
    #[error(
        "there is no {}: it is a symbolic link that leads to nothing inside the build context",
        path.display()
    )]
    LeadsNowhere {
        /// Which.
        path: PathBuf,
    },
    /// The Dockerfile or .dockerignore cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The Dockerfile is far too large.
    #[error("{} has {size} bytes; that is no Dockerfile", path.display())]
    TooLarge {
        /// Which.
        path: PathBuf,
        /// Its size.
        size: u64,
    },
    /// .dockerignore holds a pattern that cannot be read.
    #[error("{}", path.display())]
    Ignore {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: PatternError,
    },
}

fn suggestion(near: &[String]) -> String {
    match near {
        [] => String::new(),
        [one] => format!("; did you mean {one}?"),
        many => format!("; did you mean one of {}?", many.join(", ")),
    }
}

/// A Dockerfile that was read.
#[derive(Debug, Clone)]
pub struct Dockerfile {
    /// For messages: as the user named it.
    pub name: String,
    /// Its bytes.
    pub text: Vec<u8>,
}

/// A context that is there.
#[derive(Debug, Clone)]
pub struct Context {
    /// Its directory; `None` when there are no files.
    pub dir: Option<PathBuf>,
    /// What is hidden.
    pub ignore: Option<Matcher>,
    /// The Dockerfile.
    pub dockerfile: Dockerfile,
}

impl Context {
    /// What a build has before it has read anything.
    pub(crate) fn nothing() -> Context {
        let dockerfile = Dockerfile {
            name: "Dockerfile".to_owned(),
            text: Vec::new(),
        };
        Context {
            dir: None,
            ignore: None,
            dockerfile,
        }
    }
}

/// Reads Dockerfile and .dockerignore. `unpacked` is where an archive's files are by now.
///
/// # Errors
/// When the context or the Dockerfile is not there, or .dockerignore is malformed.
pub fn load(
    source: &ContextSource,
    unpacked: Option<&Path>,
    dockerfile: &DockerfileSource,
) -> Result<Context, ContextError> {
    let dir = match (source, unpacked) {
        (ContextSource::Directory(dir), _) => {
            let meta = std::fs::metadata(dir).map_err(|source| ContextError::Open {
                path: dir.clone(),
                source,
            })?;
            if !meta.is_dir() {
                return Err(ContextError::NotADirectory { path: dir.clone() });
            }
            Some(dir.clone())
        }
        (_, Some(dir)) => Some(dir.to_path_buf()),
        (_, None) => None,
    };
    let files = match &dir {
        Some(dir) => Some(Files {
            root: Root::open(dir).map_err(|source| ContextError::Open {
                path: dir.clone(),
                source,
            })?,
            dir: dir.clone(),
            archive: matches!(source, ContextSource::Archive(_)),
        }),
        None => None,
    };
    let path = match (dockerfile, &files) {
        (DockerfileSource::Text(_), _) => None,
        (DockerfileSource::Path(path), Some(files)) => Some(files.named(path)),
        (DockerfileSource::Path(path), None) => Some(Place::Host(path.clone())),
        (DockerfileSource::Default, None) => Some(Place::Host("Dockerfile".into())),
        (DockerfileSource::Default, Some(files)) => {
            let (upper, lower) = (Path::new("Dockerfile"), Path::new("dockerfile"));
            let name = if !files.has(upper) && files.has(lower) {
                lower
            } else {
                upper
            };
            Some(Place::Own(name.to_path_buf()))
        }
    };
    let dockerfile = match (dockerfile, &path) {
        (DockerfileSource::Text(text), _) => Dockerfile {
            name: "Dockerfile".into(),
            text: text.clone(),
        },
        (_, Some(place)) => read_dockerfile(files.as_ref(), place)?,
        (_, None) => read_dockerfile(files.as_ref(), &Place::Host("Dockerfile".into()))?,
    };
    let ignore = match &files {
        Some(files) => read_ignore(files, path.as_ref())?,
        None => None,
    };
    Ok(Context {
        dir,
        ignore,
        dockerfile,
    })
}

/// Where a file is that says how to build.
enum Place {
    /// In the context, relative to its top: somebody's, whose links lead no further than the context.
    Own(PathBuf),
    /// On the host: the user named it.
    Host(PathBuf),
}

/// The context's files.
struct Files {
    root: Root,
    dir: PathBuf,
    /// They came as an archive: the user does not know where they are.
    archive: bool,
}

impl Files {
    /// The place of a Dockerfile that the user named. As docker does: beside the working directory first, then in the
    /// context; of an archive only there.
    fn named(&self, path: &Path) -> Place {
        if self.archive {
            return Place::Own(path.strip_prefix("/").unwrap_or(path).to_path_buf());
        }
        if path.is_relative() && !path.exists() && self.has(path) {
            return Place::Own(path.to_path_buf());
        }
        Place::Host(path.to_path_buf())
    }

    fn has(&self, path: &Path) -> bool {
        matches!(self.root.symlink_metadata(path), Ok(Some(_)))
    }

    /// A file of the context; `None` when it is not there.
    fn read(&self, path: &Path) -> Result<Option<Vec<u8>>, ContextError> {
        let failed = |source| ContextError::Read {
            path: self.shown(path),
            source,
        };
        let read = self.root.read(path, DOCKERFILE_LIMIT as usize).map_err(failed)?;
        if read.is_none() && self.has(path) {
            // Nothing was meant to be hidden, or everything: better not to guess.
            let path = self.shown(path);
            return Err(ContextError::LeadsNowhere { path });
        }
        Ok(read)
    }

    /// A path of the context as the user would name it.
    fn shown(&self, path: &Path) -> PathBuf {
        match self.archive {
            true => path.to_path_buf(),
            false => self.dir.join(path),
        }
    }

    /// The place beside a Dockerfile: what lies in the context is the context's own.
    fn beside(&self, dockerfile: &Place, name: &OsStr) -> Place {
        match dockerfile {
            Place::Own(path) => Place::Own(path.with_file_name(name)),
            Place::Host(path) => {
                let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
                let folder = std::fs::canonicalize(folder.unwrap_or(Path::new(".")));
                let own = folder
                    .ok()
                    .zip(std::fs::canonicalize(&self.dir).ok())
                    .and_then(|(folder, dir)| Some(folder.strip_prefix(dir).ok()?.join(name)));
                own.map_or_else(|| Place::Host(path.with_file_name(name)), Place::Own)
            }
        }
    }
}

/// A file of the host's; `None` when it is not there. Waits for nobody and reads no more than may be.
fn read_host(path: &Path) -> Result<Option<Vec<u8>>, ContextError> {
    use std::os::unix::fs::OpenOptionsExt;
    let failed = |source| ContextError::Read {
        path: path.to_path_buf(),
        source,
    };
    let nonblocking = rustix::fs::OFlags::NONBLOCK | rustix::fs::OFlags::NOCTTY;
    let opened = std::fs::File::options()
        .read(true)
        .custom_flags(i32::try_from(nonblocking.bits()).unwrap_or_default())
        .open(path);
    let file = match opened {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(failed(e)),
    };
    let meta = file.metadata().map_err(failed)?;
    if meta.is_dir() {
        return Err(failed(io::ErrorKind::IsADirectory.into()));
    }
    if !meta.is_file() {
        let why = "it is not a regular file; give a Dockerfile from elsewhere as -f -";
        return Err(failed(io::Error::new(io::ErrorKind::InvalidInput, why)));
    }
    let mut bytes = Vec::new();
    file.take(DOCKERFILE_LIMIT + 1)
        .read_to_end(&mut bytes)
        .map_err(failed)?;
    if bytes.len() as u64 > DOCKERFILE_LIMIT {
        return Err(ContextError::TooLarge {
            path: path.to_path_buf(),
            size: meta.len().max(bytes.len() as u64),
        });
    }
    Ok(Some(bytes))
}

fn read(files: Option<&Files>, place: &Place) -> Result<Option<Vec<u8>>, ContextError> {
    match (place, files) {
        (Place::Own(path), Some(files)) => files.read(path),
        (Place::Own(path) | Place::Host(path), _) => read_host(path),
    }
}

/// A place as the user would name it.
fn shown(files: Option<&Files>, place: &Place) -> PathBuf {
    match (place, files) {
        (Place::Own(path), Some(files)) => files.shown(path),
        (Place::Own(path) | Place::Host(path), _) => path.clone(),
    }
}

fn read_dockerfile(files: Option<&Files>, place: &Place) -> Result<Dockerfile, ContextError> {
    let path = shown(files, place);
    match read(files, place)? {
        Some(text) => Ok(Dockerfile {
            name: path.to_string_lossy().into_owned(),
            text,
        }),
        None => {
            let looked = match (place, files) {
                (Place::Own(own), Some(files)) => files.dir.join(own),
                _ => path.clone(),
            };
            Err(ContextError::NoDockerfile {
                near: near(&looked),
                path,
            })
        }
    }
}

/// Files in the same folder that the user may have meant.
fn near(path: &Path) -> Vec<String> {
    let dir = path
        .parent()
        .filter(|p| !p.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    let wanted = path
        .file_name()
        .map(|n| n.to_string_lossy().to_lowercase())
        .unwrap_or_default();
    let Ok(entries) = std::fs::read_dir(dir) else {
        return Vec::new();
    };
    let mut names: Vec<(usize, String)> = entries
        .filter_map(Result::ok)
        .filter(|e| e.file_type().is_ok_and(|t| t.is_file()))
        .map(|e| e.file_name().to_string_lossy().into_owned())
        .filter_map(|name| {
            let lower = name.to_lowercase();
            let distance = edit_distance(&wanted, &lower);
            let kin =
                lower.contains("dockerfile") && wanted.contains("dockerfile") && distance <= wanted.len() / 2;
            (distance <= 3 || kin).then_some((distance, name))
        })
        .collect();
    names.sort();
    let best = names.first().map_or(0, |n| n.0);
    names
        .into_iter()
        .filter(|n| n.0 <= best + 1)
        .take(3)
        .map(|n| n.1)
        .collect()
}

/// Levenshtein's distance.
pub(crate) fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, cb) in b.iter().enumerate() {
            let replace = diagonal + usize::from(ca != *cb);
            diagonal = row[j + 1];
            row[j + 1] = replace.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

/// `<Dockerfile>.dockerignore` beside the Dockerfile wins over the context's own.
fn read_ignore(files: &Files, dockerfile: Option<&Place>) -> Result<Option<Matcher>, ContextError> {
    let own = dockerfile.map(|place| {
        let (Place::Own(path) | Place::Host(path)) = place;
        let mut name = path.file_name().unwrap_or_default().to_os_string();
        name.push(".dockerignore");
        files.beside(place, &name)
    });
    for place in own.into_iter().chain([Place::Own(".dockerignore".into())]) {
        let Some(text) = read(Some(files), &place)? else {
            continue;
        };
        let patterns = ignore::parse(&text);
        if patterns.is_empty() {
            return Ok(None);
        }
        let path = shown(Some(files), &place);
        return Matcher::new(&patterns)
            .map(Some)
            .map_err(|source| ContextError::Ignore { path, source });
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dockerfile_of_a_near_name_is_suggested() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("trainer.dockerfile"), "FROM scratch").unwrap();
        std::fs::write(dir.path().join("unrelated.txt"), "").unwrap();
        let source = ContextSource::Directory(dir.path().to_path_buf());
        let asked = DockerfileSource::Path(dir.path().join("train.dockerfile"));
        let error = load(&source, None, &asked).unwrap_err().to_string();
        assert!(
            error.ends_with("train.dockerfile; did you mean trainer.dockerfile?"),
            "{error}"
        );
    }

    #[test]
    fn the_dockerfiles_own_ignore_file_wins() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("Dockerfile2"), "FROM scratch").unwrap();
        std::fs::write(dir.path().join(".dockerignore"), "a\n").unwrap();
        std::fs::write(dir.path().join("Dockerfile2.dockerignore"), "b\n").unwrap();
        let source = ContextSource::Directory(dir.path().to_path_buf());
        let asked = DockerfileSource::Path(dir.path().join("Dockerfile2"));
        let ignore = load(&source, None, &asked).unwrap().ignore.unwrap();
        assert!(ignore.matches_or_parent("b"));
        assert!(!ignore.matches_or_parent("a"));
    }

    #[test]
    fn what_a_context_says_of_itself_is_read_inside_it_and_nothing_else_of_the_host() {
        let dir = tempfile::tempdir().unwrap();
        let context = dir.path().join("context");
        std::fs::create_dir(&context).unwrap();
        std::fs::write(dir.path().join("secret"), "FROM secret").unwrap();
        std::fs::write(context.join("real"), "FROM scratch").unwrap();
        let source = ContextSource::Directory(context.clone());
        let load = |dockerfile: &DockerfileSource| load(&source, None, dockerfile);
        let link = |to: &str, name: &str| {
            let _ = std::fs::remove_file(context.join(name));
            std::os::unix::fs::symlink(to, context.join(name)).unwrap();
        };
        let default = DockerfileSource::Default;
        // Out of it, absolute or upwards.
        for out in [dir.path().join("secret").to_str().unwrap(), "../secret"] {
            link(out, "Dockerfile");
            let error = crate::chain(&load(&default).unwrap_err()).to_string();
            assert!(
                error.contains("leads to nothing inside the build context"),
                "{error}"
            );
        }
        link("real", "Dockerfile");
        assert_eq!(load(&default).unwrap().dockerfile.text, b"FROM scratch");
        for name in [".dockerignore", "Dockerfile.dockerignore"] {
            // Neither a device that never ends nor what is not there, nor one that waits for a writer.
            for to in ["/dev/zero", "../secret"] {
                link(to, name);
                assert!(load(&default).is_err(), "{name} -> {to}");
            }
            std::fs::remove_file(context.join(name)).unwrap();
            let fifo = (rustix::fs::FileType::Fifo, rustix::fs::Mode::RUSR);
            rustix::fs::mknodat(rustix::fs::CWD, context.join(name), fifo.0, fifo.1, 0).unwrap();
            let error = crate::chain(&load(&default).unwrap_err()).to_string();
            assert!(error.contains("not a file"), "{error}");
            // Also where the Dockerfile was named.
            let named = DockerfileSource::Path(context.join("Dockerfile"));
            assert!(load(&named).is_err(), "{name}");
            std::fs::remove_file(context.join(name)).unwrap();
        }
        // What the user names is the host's.
        let named = |path: &str| DockerfileSource::Path(path.into());
        let outside = DockerfileSource::Path(dir.path().join("secret"));
        assert_eq!(load(&outside).unwrap().dockerfile.text, b"FROM secret");
        let error = crate::chain(&load(&named("/dev/zero")).unwrap_err()).to_string();
        assert!(error.contains("not a regular file"), "{error}");
        let large = dir.path().join("large");
        std::fs::File::create(&large)
            .unwrap()
            .set_len(DOCKERFILE_LIMIT + 1)
            .unwrap();
        let error = load(&DockerfileSource::Path(large)).unwrap_err();
        assert!(matches!(error, ContextError::TooLarge { .. }), "{error}");
    }

    #[test]
    fn distances_are_counted() {
        assert_eq!(edit_distance("train", "trainer"), 2);
        assert_eq!(edit_distance("", "abc"), 3);
        assert_eq!(edit_distance("same", "same"), 0);
    }
}

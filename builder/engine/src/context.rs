//! The build context: where its files are, what its .dockerignore hides, and the Dockerfile's text.
//! Knows nothing of what instructions do with them.

use std::io;
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
    let files = match (source, &dir) {
        (ContextSource::Archive(_), Some(dir)) => Files::Inside {
            root: Root::open(dir).map_err(|source| ContextError::Open {
                path: dir.clone(),
                source,
            })?,
            dir: dir.clone(),
        },
        _ => Files::Host,
    };
    let base = dir.clone().unwrap_or_default();
    let path = match dockerfile {
        DockerfileSource::Text(_) => None,
        DockerfileSource::Default => {
            let (upper, lower) = (base.join("Dockerfile"), base.join("dockerfile"));
            Some(if !files.has(&upper) && files.has(&lower) {
                lower
            } else {
                upper
            })
        }
        DockerfileSource::Path(path) => Some(match &files {
            Files::Inside { .. } => base.join(path.strip_prefix("/").unwrap_or(path)),
            // As docker does: beside the working directory first, then in the context.
            Files::Host if !path.exists() && path.is_relative() && base.join(path).exists() => {
                base.join(path)
            }
            Files::Host => path.clone(),
        }),
    };
    let dockerfile = match (dockerfile, &path) {
        (DockerfileSource::Text(text), _) => Dockerfile {
            name: "Dockerfile".into(),
            text: text.clone(),
        },
        (_, path) => read_dockerfile(&files, path.as_deref().unwrap_or(Path::new("Dockerfile")))?,
    };
    let ignore = match &dir {
        Some(dir) => read_ignore(&files, dir, path.as_deref())?,
        None => None,
    };
    Ok(Context {
        dir,
        ignore,
        dockerfile,
    })
}

/// Where the Dockerfile and .dockerignore are read from.
enum Files {
    /// The host's own files: the user's.
    Host,
    /// An unpacked archive: somebody's, whose links lead no further than itself.
    Inside { root: Root, dir: PathBuf },
}

impl Files {
    /// A file's bytes; `None` when it is not there.
    fn read(&self, path: &Path) -> Result<Option<Vec<u8>>, ContextError> {
        let failed = |source| ContextError::Read {
            path: self.shown(path),
            source,
        };
        match self {
            Files::Inside { root, dir } => {
                let path = path.strip_prefix(dir).unwrap_or(path);
                root.read(path, DOCKERFILE_LIMIT as usize).map_err(failed)
            }
            Files::Host => match std::fs::metadata(path) {
                Ok(meta) if meta.is_dir() => Err(failed(io::ErrorKind::IsADirectory.into())),
                Ok(meta) if meta.len() > DOCKERFILE_LIMIT => Err(ContextError::TooLarge {
                    path: path.to_path_buf(),
                    size: meta.len(),
                }),
                Ok(_) => std::fs::read(path).map(Some).map_err(failed),
                Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
                Err(e) => Err(failed(e)),
            },
        }
    }

    fn has(&self, path: &Path) -> bool {
        match self {
            Files::Inside { root, dir } => {
                matches!(root.metadata(path.strip_prefix(dir).unwrap_or(path)), Ok(Some(_)))
            }
            Files::Host => path.exists(),
        }
    }

    /// A path as the user would name it.
    fn shown(&self, path: &Path) -> PathBuf {
        match self {
            Files::Inside { dir, .. } => path.strip_prefix(dir).unwrap_or(path).to_path_buf(),
            Files::Host => path.to_path_buf(),
        }
    }
}

fn read_dockerfile(files: &Files, path: &Path) -> Result<Dockerfile, ContextError> {
    let shown = files.shown(path);
    match files.read(path)? {
        Some(text) => Ok(Dockerfile {
            name: shown.to_string_lossy().into_owned(),
            text,
        }),
        None => Err(ContextError::NoDockerfile {
            path: shown,
            near: near(path),
        }),
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
fn read_ignore(
    files: &Files,
    dir: &Path,
    dockerfile: Option<&Path>,
) -> Result<Option<Matcher>, ContextError> {
    let own = dockerfile.map(|path| {
        let mut name = path.file_name().unwrap_or_default().to_os_string();
        name.push(".dockerignore");
        path.with_file_name(name)
    });
    for path in own.into_iter().chain([dir.join(".dockerignore")]) {
        let Some(text) = files.read(&path)? else { continue };
        let patterns = ignore::parse(&text);
        if patterns.is_empty() {
            return Ok(None);
        }
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
    fn distances_are_counted() {
        assert_eq!(edit_distance("train", "trainer"), 2);
        assert_eq!(edit_distance("", "abc"), 3);
        assert_eq!(edit_distance("same", "same"), 0);
    }
}

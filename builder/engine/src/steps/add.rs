//! What ADD and COPY take from nowhere near: heredocs written in the Dockerfile. URLs and git repositories are not
//! fetched yet, and say so.

use std::io::Write;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;

use slipway_dockerfile::step::{CopySource, CopyStep};

use super::StepContext;
use super::copy::Taken;
use crate::copy::digest::Selection;
use crate::copy::tree::{All, Owners, Tree};
use crate::error::StepError;

/// A file that was made for the step, alone in a tree of its own.
pub(super) struct Fetched {
    tree: Arc<Tree>,
    name: String,
}

impl Fetched {
    /// As a source of the copy.
    pub fn taken(self, unpack: bool) -> Result<Taken, StepError> {
        let mut selections = Vec::new();
        // Its name may hold what would be a wildcard elsewhere.
        if let Some(found) = self.tree.find(Path::new("/").join(&self.name).as_path())? {
            let entries = self.tree.list(&found, &All)?;
            selections.push(Selection {
                found,
                entries,
                contents_only: false,
            });
        }
        Ok(Taken {
            tree: self.tree,
            selections,
            unpack,
        })
    }
}

/// One answer for each source; `None` for those that are paths.
pub(super) async fn fetch(cx: &StepContext<'_>, step: &CopyStep) -> Result<Vec<Option<Fetched>>, StepError> {
    let mut fetched = Vec::with_capacity(step.sources.len());
    for source in &step.sources {
        fetched.push(match source {
            CopySource::Path { .. } => None,
            CopySource::Document { name, content } => {
                let dir = cx.build.sandbox.fresh_dir("add")?;
                Some(document(&dir, name, content)?)
            }
            CopySource::Url { url, .. } => {
                return Err(StepError::Unsupported {
                    what: format!("ADD of a URL ({url})"),
                });
            }
            CopySource::Git(git) => {
                return Err(StepError::Unsupported {
                    what: format!("ADD of a git repository ({})", git.remote),
                });
            }
        });
    }
    Ok(fetched)
}

fn document(dir: &Path, name: &str, content: &str) -> Result<Fetched, StepError> {
    // The name is a word of the Dockerfile: only its last part can be a file's.
    let name = Path::new(name)
        .file_name()
        .map_or_else(|| "EOF".into(), |n| n.to_string_lossy().into_owned());
    let path = dir.join(&name);
    let io = |source| StepError::Io {
        act: "write",
        path: path.clone(),
        source,
    };
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o644)
        .open(&path)
        .map_err(io)?;
    file.write_all(content.as_bytes()).map_err(io)?;
    file.set_permissions(std::fs::Permissions::from_mode(0o644))
        .map_err(io)?;
    let tree = Tree::open(dir, None, Owners::Root, "the Dockerfile's inline files")?;
    Ok(Fetched {
        tree: Arc::new(tree),
        name,
    })
}

//! The cases, in memory and on disk: `<paths.state>/faults.json`, of one boot, durable before what it says is done.
//!
//! A disk that does not take it is told of and keeps nobody from acting: a sick GPU is worse than a step that is done twice.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tokio::sync::Mutex;

use super::case::{Case, Target};

/// The record's version.
const VERSION: u32 = 1;

/// What is in the file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Page {
    version: u32,
    boot_id: String,
    cases: Vec<Case>,
}

/// All cases.
#[derive(Debug)]
pub struct Book {
    file: PathBuf,
    page: Mutex<Page>,
}

impl Book {
    /// Reads the file. Of another boot, the containers have ended with it.
    pub fn open(folder: &Path, boot_id: &str) -> Book {
        let file = folder.join("faults.json");
        let fresh = Page {
            version: VERSION,
            boot_id: boot_id.to_owned(),
            cases: Vec::new(),
        };
        let page = match read(&file) {
            Ok(Some(page)) if page.version == VERSION && page.boot_id == boot_id => page,
            Ok(_) => fresh,
            Err(e) => {
                let error = &e as &dyn std::error::Error;
                tracing::warn!(file = %file.display(), error, "the record of what is done about sick GPUs cannot be used");
                fresh
            }
        };
        Book {
            file,
            page: Mutex::new(page),
        }
    }

    /// Every case.
    pub async fn cases(&self) -> Vec<Case> {
        self.page.lock().await.cases.clone()
    }

    /// Whether it is a case still, and no other has come in its place.
    pub async fn has(&self, case: &Case) -> bool {
        let page = self.page.lock().await;
        page.cases.iter().any(|c| c.key() == case.key())
    }

    /// Takes a case up, or puts it in the place of the one of the same GPU.
    pub async fn put(&self, case: Case) {
        self.change(|cases| {
            cases.retain(|c| c.gpu != case.gpu);
            cases.push(case);
        })
        .await;
    }

    /// Forgets cases.
    pub async fn keep_only(&self, keep: impl Fn(&Case) -> bool) {
        self.change(|cases| cases.retain(&keep)).await;
    }

    /// Changes what is known of one target of a case.
    pub async fn target(&self, case: &Case, n: usize, change: impl FnOnce(&mut Target)) {
        self.change(|cases| {
            let same = cases.iter_mut().find(|c| c.key() == case.key());
            if let Some(target) = same.and_then(|c| c.targets.as_mut()?.get_mut(n)) {
                change(target);
            }
        })
        .await;
    }

    /// Writes down who has the GPU: the places of those who were not known.
    pub async fn found(&self, case: &Case, holders: Vec<Target>) -> Vec<usize> {
        let mut places = Vec::new();
        self.change(|cases| {
            let same = cases.iter_mut().find(|c| c.key() == case.key());
            let Some(case) = same else { return };
            let known = case.targets.get_or_insert_default();
            for holder in holders {
                match known.iter_mut().find(|t| t.is_of(&holder)) {
                    Some(target) => target.learn(holder),
                    None => {
                        places.push(known.len());
                        known.push(holder);
                    }
                }
            }
        })
        .await;
        places
    }

    /// Writes down what was not known of those who have the GPU.
    pub async fn told(&self, case: &Case, holders: Vec<Target>) {
        self.change(|cases| {
            let same = cases.iter_mut().find(|c| c.key() == case.key());
            let Some(known) = same.and_then(|c| c.targets.as_mut()) else {
                return;
            };
            for holder in holders {
                if let Some(target) = known.iter_mut().find(|t| t.is_of(&holder)) {
                    target.learn(holder);
                }
            }
        })
        .await;
    }

    async fn change(&self, change: impl FnOnce(&mut Vec<Case>)) {
        let mut page = self.page.lock().await;
        let before = page.clone();
        change(&mut page.cases);
        if *page == before {
            return;
        }
        let (file, new) = (self.file.clone(), page.clone());
        let written = tokio::task::spawn_blocking(move || write(&file, &new)).await;
        if let Err(e) = written.unwrap_or_else(|e| Err(io::Error::other(e))) {
            let error = &e as &dyn std::error::Error;
            tracing::error!(file = %self.file.display(), error, "what is done about sick GPUs cannot be written down");
        }
    }
}

fn read(file: &Path) -> io::Result<Option<Page>> {
    match std::fs::read(file) {
        Ok(text) => Ok(Some(serde_json::from_slice(&text)?)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}

fn write(path: &Path, page: &Page) -> io::Result<()> {
    let new = path.with_extension("new");
    let mut file = std::fs::File::create(&new)?;
    file.write_all(&serde_json::to_vec(page)?)?;
    file.sync_all()?;
    std::fs::rename(&new, path)?;
    match path.parent() {
        Some(folder) => std::fs::File::open(folder)?.sync_all(),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use slipway_gpu::health::Unhealthy;

    fn case(gpu: &str, since: u64) -> Case {
        let sick = Unhealthy {
            reason: "XID 79".into(),
            xid: Some(79),
            since,
            sign: None,
            work: slipway_gpu::health::Work::Over,
        };
        Case::of((gpu, 0), &sick, (false, false), since).expect("a case")
    }

    #[tokio::test]
    async fn the_book_outlives_the_agent_and_not_the_boot() {
        let dir = tempfile::tempdir().expect("a directory");
        let book = Book::open(dir.path(), "boot-1");
        book.put(case("GPU-1", 1)).await;
        book.put(case("GPU-2", 1)).await;
        book.put(case("GPU-1", 2)).await;
        book.keep_only(|c| c.gpu != "GPU-2").await;
        let again = Book::open(dir.path(), "boot-1");
        assert_eq!(again.cases().await, [case("GPU-1", 2)]);
        assert!(Book::open(dir.path(), "boot-2").cases().await.is_empty());
        std::fs::write(dir.path().join("faults.json"), "{").expect("written");
        assert!(Book::open(dir.path(), "boot-1").cases().await.is_empty());
    }

    #[tokio::test]
    async fn a_step_of_an_older_case_changes_nothing_of_the_newer() {
        let dir = tempfile::tempdir().expect("a directory");
        let book = Book::open(dir.path(), "boot");
        let target = Target {
            namespace: "n".into(),
            pod: "p".into(),
            uid: None,
            container: "c".into(),
            id: None,
            announced: false,
            killed: false,
            done: false,
        };
        let with = |since| Case {
            targets: Some(vec![target.clone()]),
            ..case("GPU-1", since)
        };
        book.put(with(2)).await;
        book.target(&with(1), 0, |t| t.done = true).await;
        assert!(!book.cases().await[0].is_done());
        book.target(&with(2), 0, |t| t.done = true).await;
        assert!(book.cases().await[0].is_done());

        // What only concerned those who wait is another case when work is over, of the same illness.
        let waiting = Case {
            only_waiting: true,
            ..with(3)
        };
        book.put(waiting.clone()).await;
        book.put(case("GPU-1", 3)).await;
        assert!(!book.has(&waiting).await);
        assert!(book.found(&waiting, vec![target.clone()]).await.is_empty());
        assert_eq!(book.cases().await, [case("GPU-1", 3)]);
    }
}

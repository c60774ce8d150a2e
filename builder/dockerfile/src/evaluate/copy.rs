//! COPY and ADD: sources by kind, the destination, what their flags say.

use super::{Evaluator, Outcome, StageState};
use crate::chmod::Chmod;
use crate::error::Problem;
use crate::git::GitReference;
use crate::instruction::{Document, Transfer};
use crate::lint::Rule;
use crate::path;
use crate::percent;
use crate::plan::Planned;
use crate::shell::Lexer;
use crate::step::{Action, CopySource, CopyStep, Source};

impl Evaluator<'_> {
    pub(super) fn copy(
        &mut self,
        state: &mut StageState,
        planned: &Planned,
        transfer: &Transfer,
        is_add: bool,
    ) -> Result<Outcome, Problem> {
        let mut created_by = if is_add { "ADD" } else { "COPY" }.to_owned();
        if transfer.parents {
            created_by.push_str(" --parents");
        }
        let chown = self.optional(state, planned, transfer.chown.as_deref())?;
        if let Some(chown) = &chown {
            created_by.push_str(&format!(" --chown={chown}"));
        }
        let chmod = self.optional(state, planned, transfer.chmod.as_deref())?;
        if let Some(chmod) = &chmod {
            created_by.push_str(&format!(" --chmod={chmod}"));
        }
        let bad_chmod = |value: &String, reason| Problem::BadChmod {
            value: value.clone(),
            reason,
        };
        let chmod = chmod
            .map(|value| Chmod::parse(&value).map_err(|r| bad_chmod(&value, r)))
            .transpose()?;
        let checksum = self.optional(state, planned, transfer.checksum.as_deref())?;
        if let Some(value) = checksum.as_ref().filter(|_| transfer.sources.len() != 1) {
            let reason = "it is for a single URL or git repository";
            return Err(Problem::BadChecksum {
                value: value.clone(),
                reason,
            });
        }
        let from = planned.from.first().cloned().flatten().unwrap_or(Source::Context);

        let mut sources = Vec::with_capacity(transfer.sources.len() + transfer.documents.len());
        for written in &transfer.sources {
            let expanded = self.expand(state, planned, written)?;
            created_by.push_str(&format!(" {expanded}"));
            let source = source(&expanded, transfer, checksum.as_deref(), is_add)?;
            if matches!(source, CopySource::Path { .. }) && from == Source::Context {
                self.ignored(planned, &expanded, is_add);
            }
            sources.push(source);
        }
        for document in &transfer.documents {
            created_by.push_str(&format!(" <<{}", document.name));
            let content = self.document(state, planned, document)?;
            sources.push(CopySource::Document {
                name: document.name.clone(),
                content,
            });
        }
        let written = self.expand(state, planned, &transfer.destination)?;
        created_by.push_str(&format!(" {written} # buildkit"));
        let step = CopyStep {
            from,
            sources,
            destination: path::join(&state.cwd(), &written),
            destination_is_directory: names_a_directory(&written),
            chown,
            chmod,
            link: transfer.link,
            parents: transfer.parents,
            exclude: transfer.exclude.clone(),
            unpack: transfer.unpack.unwrap_or(is_add),
            is_add,
        };
        Ok(Outcome::layer(Action::Copy(Box::new(step)), created_by))
    }

    fn optional(
        &mut self,
        state: &StageState,
        planned: &Planned,
        value: Option<&str>,
    ) -> Result<Option<String>, Problem> {
        let expanded = value
            .map(|value| self.expand(state, planned, value))
            .transpose()?;
        Ok(expanded.filter(|value| !value.is_empty()))
    }

    // In a document quotes mean themselves, and the escape character is `\` whatever the file says.
    fn document(
        &mut self,
        state: &StageState,
        planned: &Planned,
        document: &Document,
    ) -> Result<String, Problem> {
        if !document.expand {
            self.charge(document.content.len())?;
            return Ok(document.content.clone());
        }
        let lexer = Lexer {
            ignore_quotes: true,
            ..Lexer::new('\\')
        };
        Ok(self.expand_with(lexer, state, planned, &document.content)?.text)
    }

    fn ignored(&mut self, planned: &Planned, source: &str, is_add: bool) {
        // With exceptions in it, an ignored directory may hold files that are not.
        let Some(ignore) = self.outline.input.ignore.as_ref().filter(|i| !i.has_exceptions()) else {
            return;
        };
        let source = path::clean(source);
        let source = if source == "/" { "." } else { source.as_str() };
        let is_ignored = match source {
            "." => ignore.ignores_everything(),
            source => ignore.matches_or_parent(source.trim_start_matches('/')),
        };
        if is_ignored {
            let verb = if is_add { "ADD" } else { "COPY" };
            let message = || format!("{verb} of \"{source}\", which .dockerignore leaves out");
            self.warn(planned, Rule::CopyIgnoredFile, message);
        }
    }
}

fn names_a_directory(written: &str) -> bool {
    matches!(written, "" | ".") || written.ends_with('/') || written.ends_with("/.")
}

fn source(
    text: &str,
    transfer: &Transfer,
    checksum: Option<&str>,
    is_add: bool,
) -> Result<CopySource, Problem> {
    if let Some(git) = GitReference::parse(text) {
        if !is_add {
            return Err(Problem::RemoteCopy {
                source_path: text.to_owned(),
            });
        }
        let bad = |reason: String| Problem::BadGitReference {
            source_path: text.to_owned(),
            reason,
        };
        return git
            .and_then(|git| git.with_flags(transfer.keep_git_dir, checksum))
            .map(CopySource::Git)
            .map_err(bad);
    }
    if text.starts_with("http://") || text.starts_with("https://") {
        if !is_add {
            return Err(Problem::RemoteCopy {
                source_path: text.to_owned(),
            });
        }
        if let Some(value) = checksum.filter(|value| !is_digest(value)) {
            let reason = "it is a digest like sha256:…";
            return Err(Problem::BadChecksum {
                value: value.to_owned(),
                reason,
            });
        }
        return Ok(CopySource::Url {
            url: text.to_owned(),
            file_name: url_file_name(text),
            checksum: checksum.map(str::to_owned),
            unpack: transfer.unpack.unwrap_or_default(),
        });
    }
    if let Some(value) = checksum {
        let reason = "it is for a URL or a git repository";
        return Err(Problem::BadChecksum {
            value: value.to_owned(),
            reason,
        });
    }
    if !transfer.parents {
        let path = path::join("/", text);
        let wildcard = has_wildcards(text);
        return Ok(CopySource::Path {
            path,
            below: None,
            wildcard,
        });
    }
    // `--parents`: directories are kept from the pivot on.
    let (above, below) = text.split_once("/./").unwrap_or(("/", text));
    let below = path::join("/", below);
    let wildcard = has_wildcards(above) || has_wildcards(&below);
    let below = Some(below.trim_start_matches('/').to_owned());
    Ok(CopySource::Path {
        path: path::join("/", above),
        below,
        wildcard,
    })
}

fn has_wildcards(path: &str) -> bool {
    let mut chars = path.chars();
    while let Some(c) = chars.next() {
        match c {
            '*' | '?' | '[' => return true,
            '\\' => drop(chars.next()),
            _ => {}
        }
    }
    false
}

fn is_digest(value: &str) -> bool {
    let Some((algorithm, hex)) = value.split_once(':') else {
        return false;
    };
    let length = match algorithm {
        "sha256" => 64,
        "sha384" => 96,
        "sha512" => 128,
        _ => return false,
    };
    hex.len() == length
        && hex
            .chars()
            .all(|c| c.is_ascii_digit() || ('a'..='f').contains(&c))
}

/// The last part of a URL's path, percent signs decoded.
fn url_file_name(url: &str) -> String {
    let path = url.split_once("://").map_or(url, |(_, rest)| rest);
    let path = path.split(['?', '#']).next().unwrap_or_default();
    let name = path.split_once('/').map_or("", |(_, path)| path::base(path));
    let decoded = percent::decoded(name);
    match decoded.as_str() {
        "" | "." | ".." => "__unnamed__".to_owned(),
        name => path::base(name).to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_name_files() {
        for (url, name) in [
            ("https://x.y/a/b.tar.gz?z=1#q", "b.tar.gz"),
            ("https://x.y/", "__unnamed__"),
            ("https://x.y", "__unnamed__"),
            ("https://x.y/a%20b", "a b"),
            ("https://x.y/%2e%2e", "__unnamed__"),
            ("https://x.y/a%2fb", "b"),
        ] {
            assert_eq!(url_file_name(url), name, "{url}");
        }
    }

    #[test]
    fn digests_are_checked() {
        assert!(is_digest(&format!("sha256:{}", "0".repeat(64))));
        assert!(!is_digest("sha256:0") && !is_digest(&format!("md5:{}", "0".repeat(64))));
    }
}

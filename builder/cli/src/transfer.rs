//! `slipway push | pull | load | save`: images in and out, with bars on a terminal.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufWriter, IsTerminal, Read, Write};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, anyhow, bail};
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::json;
use slipway_engine::Cancel;
use slipway_image::{
    ArchiveFormat, Digest, Image, Platform, Progress, ProgressEvent, Puller, Pusher, Reference, Store,
    UnpackOptions,
};

use crate::Failure;
use crate::args::{ArchiveForm, Format, LoadArgs, PullArgs, PushArgs, SaveArgs};
use crate::images::{self, blocking, find};
use crate::places::Places;
use crate::text;

/// `slipway pull`.
pub async fn pull(places: &Places, store: &Store, args: PullArgs, cancel: Cancel) -> Result<(), Failure> {
    let name =
        Reference::parse(&args.name).with_context(|| format!("{} is not the name of an image", args.name))?;
    let platform = match &args.platform {
        Some(text) => Platform::parse(text)?,
        None => Platform::host(),
    };
    let puller = Puller::new(store.clone(), places.registries());
    let quiet = args.quiet || args.format.format == Format::Json;
    let bars = Bars::new(quiet);
    let image = tokio::select! {
        image = puller.pull(&name, None, &platform, &bars) => image,
        () = cancel.wait() => return Err(Failure::Interrupted),
    };
    bars.clear();
    let image = image?;
    match args.format.format {
        Format::Json => outln!("{}", serde_json::to_string_pretty(&images::json(&image))?),
        Format::Table if args.quiet => outln!("{}", image.id),
        Format::Table => {
            outln!(
                "{}  {}  {}",
                name.familiar(),
                text::short(&image.id.to_string()),
                text::size(image.size)
            );
            image.repo_digests.iter().for_each(|d| outln!("  {d}"));
            if name.digest().is_none() && !image.names.contains(&name.canonical()) {
                outln!(
                    "  without the name, which means what runs on this machine: {platform} is found by its digest"
                );
            }
        }
    }
    Ok(())
}

/// `slipway push`.
pub async fn push(places: &Places, store: &Store, args: PushArgs, cancel: Cancel) -> Result<(), Failure> {
    let name =
        Reference::parse(&args.name).with_context(|| format!("{} is not the name of an image", args.name))?;
    let (asked, wanted) = (store.clone(), args.name.clone());
    let image = blocking(move || find(&asked, &wanted)).await?;
    // A digest is refused for what it is. What is left is an id, whose digits would be a repository's name.
    if name.digest().is_none() && !image.names.contains(&name.canonical()) {
        let wanted = &args.name;
        return Err(anyhow!("{wanted} is an image's id; give it a name with `slipway tag` first").into());
    }
    let json_wanted = args.format.format == Format::Json;
    let digest = send(places, store, &image, &name, args.quiet || json_wanted, &cancel).await?;
    if json_wanted {
        let json =
            json!({ "name": name.to_string(), "digest": digest.to_string(), "id": image.id.to_string() });
        outln!("{}", serde_json::to_string_pretty(&json)?);
    } else if args.quiet {
        outln!("{digest}");
    } else {
        outln!("pushed {}@{digest}", name.familiar());
    }
    Ok(())
}

/// Pushes what a build made.
pub async fn push_image(
    places: &Places,
    store: &Store,
    image: &Image,
    to: &Reference,
    quiet: bool,
    cancel: &Cancel,
) -> Result<(), Failure> {
    let began = std::time::Instant::now();
    let digest = send(places, store, image, to, quiet, cancel).await?;
    if !quiet {
        outln!(
            "pushed {}@{digest} in {}",
            to.familiar(),
            text::time(began.elapsed())
        );
    }
    Ok(())
}

async fn send(
    places: &Places,
    store: &Store,
    image: &Image,
    to: &Reference,
    quiet: bool,
    cancel: &Cancel,
) -> Result<Digest, Failure> {
    let pusher = Pusher::new(store.clone(), places.registries());
    let bars = Bars::new(quiet);
    let pushed = tokio::select! {
        pushed = pusher.push(image, to, None, &bars) => pushed,
        () = cancel.wait() => return Err(Failure::Interrupted),
    };
    bars.clear();
    Ok(pushed?)
}

/// `slipway load`.
pub async fn load(store: &Store, args: LoadArgs, cancel: Cancel) -> Result<(), Failure> {
    let store = store.clone();
    let (quiet, format) = (args.quiet, args.format.format);
    let work = blocking(move || {
        let mut stream: Box<dyn Read> = match &args.input {
            Some(path) => Box::new(open(path)?),
            None if std::io::stdin().is_terminal() => {
                bail!("slipway load reads an archive from a file (-i FILE) or from a pipe")
            }
            None => Box::new(std::io::stdin().lock()),
        };
        store
            .import(&mut stream, &UnpackOptions::default())
            .with_context(|| match &args.input {
                Some(path) => format!("cannot load {}", path.display()),
                None => "cannot load what came from stdin".to_owned(),
            })
    });
    let loaded = tokio::select! {
        loaded = work => loaded?,
        () = cancel.wait() => return Err(Failure::Interrupted),
    };
    if format == Format::Json {
        let all: Vec<_> = loaded.iter().map(images::json).collect();
        outln!("{}", serde_json::to_string_pretty(&all)?);
    } else if !quiet {
        for image in &loaded {
            let names: Vec<String> = image.names.iter().map(Reference::familiar).collect();
            let names = if names.is_empty() {
                "no name".to_owned()
            } else {
                names.join(", ")
            };
            outln!("loaded {names}  {}", image.id);
        }
    }
    Ok(())
}

fn open(path: &Path) -> Result<File> {
    File::open(path).with_context(|| format!("cannot open {}", path.display()))
}

/// `slipway save`.
pub async fn save(store: &Store, args: SaveArgs, cancel: Cancel) -> Result<(), Failure> {
    let (store, stop) = (store.clone(), cancel.clone());
    let is_file = args.output.is_some();
    let work = blocking(move || {
        let format = match args.format {
            ArchiveForm::Docker => ArchiveFormat::Docker,
            ArchiveForm::Oci => ArchiveFormat::Oci,
        };
        let names: Vec<&str> = args.images.iter().map(String::as_str).collect();
        for name in &names {
            find(&store, name)?;
        }
        let Some(path) = &args.output else {
            if std::io::stdout().is_terminal() {
                bail!(
                    "slipway save writes an archive to a file (-o FILE) or into a pipe, not onto a terminal"
                );
            }
            let mut out = BufWriter::new(std::io::stdout().lock());
            let written = store
                .export(&names, format, &mut out)
                .map_err(anyhow::Error::from);
            let written = written.and_then(|()| out.flush().context("write the image archive"));
            return written.map_err(|error| match is_broken_pipe(&error) {
                true => anyhow!("whoever read the image archive went away before it was whole"),
                false => error,
            });
        };
        write_whole(path, &stop, |out| Ok(store.export(&names, format, out)?))
    });
    tokio::pin!(work);
    tokio::select! {
        saved = &mut work => return Ok(saved?),
        () = cancel.wait() => {}
    }
    // The file that is not whole goes first; who reads a pipe may be as slow as they like.
    if is_file && let Ok(()) = work.await {
        return Ok(());
    }
    Err(Failure::Interrupted)
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let of_io = |cause: &(dyn std::error::Error + 'static)| {
        let io = cause.downcast_ref::<std::io::Error>();
        io.is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
    };
    error.chain().any(of_io)
}

/// A file that is written until a [`Cancel`] is set.
struct Stoppable<'a> {
    file: File,
    stop: &'a Cancel,
}

impl Write for Stoppable<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        match self.stop.is_set() {
            true => Err(std::io::Error::other("interrupted")),
            false => self.file.write(bytes),
        }
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.file.flush()
    }
}

/// Writes a file that is there whole or not at all, also after a loss of power.
fn write_whole(path: &Path, stop: &Cancel, write: impl FnOnce(&mut dyn Write) -> Result<()>) -> Result<()> {
    let name = path
        .file_name()
        .ok_or_else(|| anyhow!("{} names no file", path.display()))?;
    let beside = path.with_file_name(format!(".{}.{}", name.to_string_lossy(), std::process::id()));
    let written = (|| {
        let file = File::create(&beside).with_context(|| format!("cannot create {}", beside.display()))?;
        let mut out = BufWriter::new(Stoppable { file, stop });
        write(&mut out)?;
        let failed = || format!("cannot write {}", path.display());
        out.flush().with_context(failed)?;
        out.get_ref().file.sync_all().with_context(failed)?;
        std::fs::rename(&beside, path).with_context(failed)?;
        let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty());
        let dir = File::open(dir.unwrap_or(Path::new(".")));
        dir.and_then(|dir| dir.sync_all()).with_context(failed)
    })();
    if written.is_err() {
        let _ = std::fs::remove_file(&beside);
    }
    written
}

/// Which layer a bar is about: pulls know the blob from the start, pushes only its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Which {
    Blob(Digest),
    Place(usize),
}

/// One bar a layer on a terminal; a line for what matters elsewhere; nothing when quiet.
struct Bars {
    quiet: bool,
    terminal: bool,
    multi: MultiProgress,
    bars: Mutex<HashMap<Which, ProgressBar>>,
    /// A line that changes: what goes on as a whole.
    status: ProgressBar,
}

impl Bars {
    fn new(quiet: bool) -> Bars {
        let terminal = std::io::stderr().is_terminal() && !quiet;
        let target = if terminal {
            ProgressDrawTarget::stderr()
        } else {
            ProgressDrawTarget::hidden()
        };
        let multi = MultiProgress::with_draw_target(target);
        let status = multi.add(ProgressBar::new_spinner());
        if let (true, Ok(style)) = (
            terminal,
            ProgressStyle::with_template("{spinner} {msg} {elapsed}"),
        ) {
            status.set_style(style);
            status.enable_steady_tick(std::time::Duration::from_millis(120));
        }
        Bars {
            quiet,
            terminal,
            multi,
            bars: Mutex::default(),
            status,
        }
    }

    fn clear(&self) {
        self.status.finish_and_clear();
        let _ = self.multi.clear();
    }

    /// A remark that stays.
    fn say(&self, line: &str) {
        if self.quiet {
            return;
        }
        if self.terminal {
            let _ = self.multi.println(line);
        } else {
            let _ = writeln!(std::io::stderr().lock(), "{line}");
        }
    }

    fn bar(&self, which: Which) -> ProgressBar {
        let mut bars = self.bars.lock().unwrap_or_else(PoisonError::into_inner);
        let bar = bars.entry(which).or_insert_with(|| {
            let bar = self.multi.add(ProgressBar::no_length());
            let template =
                "  {prefix:12} {bar:28} {bytes:>10} of {total_bytes:>10} {bytes_per_sec:>12} {msg}";
            if let Ok(style) = ProgressStyle::with_template(template) {
                bar.set_style(style);
            }
            bar.set_prefix(match which {
                Which::Blob(digest) => text::short(&digest.to_string()).to_owned(),
                Which::Place(index) => format!("layer {}", index + 1),
            });
            bar
        });
        bar.clone()
    }

    fn transferred(&self, which: Which, done: u64, total: Option<u64>) {
        let bar = self.bar(which);
        if let Some(total) = total {
            bar.set_length(total);
        }
        bar.set_position(done);
        if total == Some(done) {
            bar.finish();
        }
    }

    /// A layer that need not be sent.
    fn settled(&self, index: usize, how: &str) {
        let bar = self.bar(Which::Place(index));
        bar.finish_with_message(how.to_owned());
        if !self.terminal {
            self.say(&format!("  layer {} {how}", index + 1));
        }
    }
}

impl Progress for Bars {
    fn event(&self, event: ProgressEvent) {
        match event {
            ProgressEvent::Resolved { digest, host } => {
                self.status
                    .set_message(format!("{} from {host}", text::short(&digest.to_string())));
            }
            ProgressEvent::Layers { layers } => {
                let missing: u64 = layers.iter().filter(|l| !l.present).map(|l| l.size).sum();
                let here = layers.iter().filter(|l| l.present).count();
                self.say(&format!(
                    "{} layers, {here} of them here; {} to fetch",
                    layers.len(),
                    text::size(missing)
                ));
                for layer in layers.iter().filter(|l| !l.present) {
                    self.transferred(Which::Blob(layer.digest), 0, Some(layer.size));
                }
            }
            ProgressEvent::Downloaded { layer, done, total } => {
                self.transferred(Which::Blob(layer), done, Some(total));
            }
            ProgressEvent::Unpacked { layer, done } => {
                self.bar(Which::Blob(layer))
                    .set_message(format!("{} unpacked", text::size(done)));
            }
            ProgressEvent::Committing => self.status.set_message("completing"),
            ProgressEvent::AnsweredByBuild { reason } => {
                self.say(&format!(
                    "the image that was built on this node is taken ({reason})"
                ));
            }
            ProgressEvent::Retrying { what, reason, pause } => {
                self.say(&format!("{what}: {reason}; again in {}", text::time(pause)));
            }
            ProgressEvent::Compressing { index, total } => {
                self.bar(Which::Place(index))
                    .set_message(format!("compressing {}", text::size(total)));
            }
            ProgressEvent::PushLayer { index, layer, size } => {
                let bar = self.bar(Which::Place(index));
                bar.set_prefix(text::short(&layer.to_string()).to_owned());
                bar.set_message("");
                bar.set_length(size);
            }
            ProgressEvent::Exists { index } => self.settled(index, "is there already"),
            ProgressEvent::Mounted { index, from } => self.settled(index, &format!("taken over from {from}")),
            ProgressEvent::Uploaded { index, done, total } => {
                self.transferred(Which::Place(index), done, total);
            }
            ProgressEvent::Pushed { .. } => self.status.set_message("pushed"),
            _ => {}
        }
    }
}

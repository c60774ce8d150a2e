//! `slipway build`: flags become a request, the engine builds, the display shows it. Knows nothing of steps.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail};
use slipway_engine::{
    BuildError, BuildRequest, Builder, Cancel, ContextSource, DeviceGrants, DeviceName, DockerfileSource,
    Interruptible, Network, Progress, build_args, own_platform,
};
use slipway_image::{OwnerKind, Platform, Puller, Reference, Store};

use crate::Failure;
use crate::args::{BuildArgs, NetworkMode};
use crate::display::{self, Display};
use crate::images::blocking;
use crate::places::Places;
use crate::transfer;

/// A Dockerfile on stdin larger than this is none.
const DOCKERFILE_LIMIT: u64 = 16 << 20;

/// Builds, and pushes where asked to.
pub async fn run(places: &Places, args: BuildArgs, cancel: Cancel) -> Result<(), Failure> {
    let args = Arc::new(args);
    // Reads stdin where it is asked to, which takes as long as whoever writes there.
    let (asked, stop) = (Arc::clone(&args), cancel.clone());
    let request = blocking(move || request(&asked, &stop)).await?;
    let store = places.store(OwnerKind::Build).await?;
    let around = places.surroundings();
    crate::sweep(&store, &around).await;
    let builder = Builder {
        puller: Arc::new(Puller::new(store.clone(), places.registries())),
        store: store.clone(),
        around,
    };
    let display: Arc<dyn Display> = display::choose(args.progress, args.quiet);
    let progress: Arc<dyn Progress> = Arc::clone(&display) as Arc<dyn Progress>;
    let tags = request.tags.clone();
    let built = builder.build(request, progress, cancel.clone()).await;
    display.finish();
    tidy(places, &store).await;
    let built = match built {
        Ok(built) => built,
        Err(BuildError::Cancelled) => return Err(Failure::Interrupted),
        Err(e) => return Err(Failure::Build(Box::new(e))),
    };
    if let Some(path) = &args.iidfile {
        std::fs::write(path, built.image.id.to_string())
            .with_context(|| format!("cannot write the image's id into {}", path.display()))?;
    }
    if args.quiet {
        outln!("{}", built.image.id);
    } else {
        out!("{}", display::summary(&built));
    }
    if args.push {
        for tag in &tags {
            transfer::push_image(places, &store, &built.image, tag, args.quiet, &cancel).await?;
        }
    }
    Ok(())
}

/// Keeps the build cache to its limits; never a reason for a build to fail.
async fn tidy(places: &Places, store: &Store) {
    let (store, limits) = (store.clone(), places.upkeep);
    let tidied = blocking(move || {
        store.tidy_cache(&limits)?;
        if limits.cache_unused_for.is_some() {
            slipway_engine::prune_cache_mounts(store.root(), limits.cache_unused_for, false).1?;
        }
        Ok(())
    });
    if let Err(error) = tidied.await {
        crate::complain(&format!("warning: the build cache cannot be tidied: {error:#}"));
    }
}

fn request(args: &BuildArgs, cancel: &Cancel) -> Result<BuildRequest> {
    if let Some(flag) = args.not_built.given().first() {
        bail!("slipway build {flag} is not built yet; leave it out if the build can do without");
    }
    let attestations = [("--provenance", &args.provenance), ("--sbom", &args.sbom)];
    for (flag, values) in attestations {
        if let Some(value) = values.iter().find(|v| !matches!(v.as_str(), "false" | "0")) {
            bail!(
                "slipway build {flag}={value}: attestations are not built yet; {flag}=false is what happens"
            );
        }
    }
    let grants = Grants::read(&args.allow)?;
    let devices = args.device.iter().map(|text| device("--device", text));
    let devices = devices.collect::<Result<Vec<_>>>()?;
    if let Some(wanted) = &args.platform {
        let wanted = Platform::parse(wanted)?;
        let own = own_platform();
        let own = Platform::new(&own.os, &own.architecture, Some(own.variant.as_str()));
        if wanted != own {
            bail!("--platform={wanted}: only this machine's own platform ({own}) can be built for yet");
        }
    }
    let tags = args
        .tag
        .iter()
        .map(|tag| parse_tag(tag))
        .collect::<Result<Vec<_>>>()?;
    if args.push && tags.is_empty() {
        bail!("--push needs a name to push to: -t registry.example/team/name:tag");
    }
    let (context, dockerfile) = sources(args, cancel)?;
    let given: Vec<(String, Option<String>)> = args
        .build_arg
        .iter()
        .map(|arg| match arg.split_once('=') {
            Some((name, value)) => (name.to_owned(), Some(value.to_owned())),
            None => (arg.clone(), None),
        })
        .collect();
    if let Some((name, _)) = given.iter().find(|(name, _)| name.is_empty()) {
        bail!("--build-arg needs a name before =: {name}=…");
    }
    let mut args_by_name = build_args(&given, |name| std::env::var(name).ok());
    // As docker's build does: the environment's is the build's.
    if let Ok(epoch) = std::env::var("SOURCE_DATE_EPOCH")
        && !epoch.is_empty()
    {
        args_by_name
            .entry("SOURCE_DATE_EPOCH".to_owned())
            .or_insert(epoch);
    }
    Ok(BuildRequest {
        context,
        dockerfile,
        tags,
        target: args.target.clone().filter(|t| !t.is_empty()),
        labels: labels(args)?,
        no_cache: args.no_cache,
        pull: args.pull,
        network: match args.network {
            NetworkMode::Default => Network::Default,
            NetworkMode::Host => Network::Host,
            NetworkMode::None => Network::None,
        },
        allow_host_network: grants.host_network,
        devices,
        allow_devices: grants.devices,
        build_args: args_by_name,
        secrets: crate::secrets::read(&args.secret)?,
    })
}

/// What `--allow` lets RUN ask for.
#[derive(Debug, Default)]
struct Grants {
    host_network: bool,
    devices: DeviceGrants,
}

impl Grants {
    /// Reads `network.host`, `device`, `device=NAME[,alias=NAME]`.
    fn read(allow: &[String]) -> Result<Grants> {
        let mut grants = Grants::default();
        for grant in allow {
            match grant.split_once('=') {
                None if grant == "network.host" => grants.host_network = true,
                None if grant == "device" => grants.devices.all = true,
                Some(("device", text)) => grants.device(grant, text)?,
                _ => bail!("slipway build --allow={grant}: network.host and devices can be granted"),
            }
        }
        Ok(grants)
    }

    fn device(&mut self, grant: &str, text: &str) -> Result<()> {
        let (name, alias) = match text.split_once(',') {
            None => (text, None),
            Some((name, rest)) => match rest.strip_prefix("alias=") {
                Some(alias) => (name, Some(alias)),
                None => bail!(
                    "slipway build --allow={grant}: {rest:?} is not alias=NAME, which is all that a device's grant can have"
                ),
            },
        };
        let name = device("--allow=device", name)?;
        match alias {
            None => drop(self.devices.names.insert(name)),
            // What a Dockerfile can say.
            Some(alias) => {
                let alias = device("--allow=device alias", alias)?.to_string();
                self.devices.aliases.insert(alias, name);
            }
        }
        Ok(())
    }
}

fn device(flag: &str, text: &str) -> Result<DeviceName> {
    text.parse()
        .with_context(|| format!("slipway build {flag}={text}"))
}

fn parse_tag(tag: &str) -> Result<Reference> {
    let reference = Reference::parse(tag).with_context(|| format!("-t {tag}: not the name of an image"))?;
    if reference.digest().is_some() {
        bail!("-t {tag}: a name for a new image cannot have a digest");
    }
    Ok(reference)
}

fn labels(args: &BuildArgs) -> Result<BTreeMap<String, String>> {
    let mut labels = BTreeMap::new();
    let mut add = |line: &str| {
        let (name, value) = line.split_once('=').unwrap_or((line, ""));
        if !name.is_empty() {
            labels.insert(name.to_owned(), value.to_owned());
        }
    };
    for path in &args.label_file {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("cannot read the labels in {}", path.display()))?;
        text.lines()
            .map(str::trim)
            .filter(|l| !l.is_empty() && !l.starts_with('#'))
            .for_each(&mut add);
    }
    args.label.iter().for_each(|l| add(l));
    Ok(labels)
}

/// Context and Dockerfile, either of which may be stdin.
fn sources(args: &BuildArgs, cancel: &Cancel) -> Result<(ContextSource, DockerfileSource)> {
    let dash = Path::new("-");
    let Some(context) = &args.context else {
        bail!(
            "slipway build needs a build context: the directory whose files COPY and ADD can take, usually `.`\n\
             \n  slipway build -t name:tag ."
        );
    };
    let file_is_stdin = args.file.as_deref() == Some(dash);
    if context != dash {
        let text = context.to_string_lossy();
        if text.contains("://") || text.starts_with("git@") || text.starts_with("github.com/") {
            bail!(
                "the build context {text}: URLs and git repositories as a context are not built yet; clone or fetch it first"
            );
        }
        let dockerfile = match &args.file {
            None => DockerfileSource::Default,
            Some(_) if file_is_stdin => DockerfileSource::Text(stdin_text(cancel)?),
            Some(path) => DockerfileSource::Path(path.clone()),
        };
        return Ok((ContextSource::Directory(context.clone()), dockerfile));
    }
    if file_is_stdin {
        bail!("-f - and the context - cannot both be read from stdin");
    }
    stdin_context(args.file.clone(), cancel)
}

/// Standard input, given up when the build is.
fn stdin(cancel: &Cancel) -> Result<(File, Interruptible)> {
    use std::os::fd::AsFd;
    let stdin = std::io::stdin();
    let fd = stdin.as_fd().try_clone_to_owned().context("cannot read stdin")?;
    let file = File::from(fd);
    let shared = file.try_clone().context("cannot read stdin")?;
    Ok((file, Interruptible::new(shared, cancel.clone())))
}

fn stdin_text(cancel: &Cancel) -> Result<Vec<u8>> {
    let mut text = Vec::new();
    stdin(cancel)?
        .1
        .take(DOCKERFILE_LIMIT + 1)
        .read_to_end(&mut text)
        .context("cannot read the Dockerfile from stdin")?;
    if text.len() as u64 > DOCKERFILE_LIMIT {
        return Err(anyhow!("what comes from stdin is too large to be a Dockerfile"));
    }
    Ok(text)
}

/// What `-` as a context is: a tar archive, packed or not, or else a Dockerfile alone, as docker tells them apart.
fn stdin_context(file: Option<PathBuf>, cancel: &Cancel) -> Result<(ContextSource, DockerfileSource)> {
    let (rest, mut stream) = stdin(cancel)?;
    let mut start = vec![0u8; 512];
    let mut filled = 0;
    while filled < start.len() {
        match stream
            .read(&mut start[filled..])
            .context("cannot read the build context from stdin")?
        {
            0 => break,
            n => filled += n,
        }
    }
    start.truncate(filled);
    if !looks_like_archive(&start) {
        let mut text = start;
        stream
            .take(DOCKERFILE_LIMIT)
            .read_to_end(&mut text)
            .context("cannot read the Dockerfile from stdin")?;
        if file.is_some() {
            bail!(
                "-f names a file of the context, but what comes from stdin is a Dockerfile, not an archive"
            );
        }
        return Ok((ContextSource::Empty, DockerfileSource::Text(text)));
    }
    let whole = slipway_engine::Stream::new(start, rest);
    let dockerfile = file.map_or(DockerfileSource::Default, DockerfileSource::Path);
    Ok((ContextSource::Archive(whole), dockerfile))
}

fn looks_like_archive(start: &[u8]) -> bool {
    matches!(
        start,
        [0x1f, 0x8b, 8, ..]
            | [0x28, 0xb5, 0x2f, 0xfd, ..]
            | [b'B', b'Z', b'h', ..]
            | [0xfd, b'7', b'z', b'X', b'Z', 0, ..]
    ) || start.get(257..262) == Some(b"ustar".as_slice())
        || (start.len() == 512 && start.iter().all(|b| *b == 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_granted_is_read_and_what_cannot_be_is_refused() {
        let read = |allow: &[&str]| {
            let allow: Vec<String> = allow.iter().map(|a| (*a).to_owned()).collect();
            Grants::read(&allow).map_err(|e| format!("{e:#}"))
        };
        let grants = read(&["network.host", "device=a.b/c=d", "device=a.b/c=*,alias=fast"]).unwrap();
        assert!(grants.host_network && !grants.devices.all);
        let names: Vec<_> = grants.devices.names.iter().map(ToString::to_string).collect();
        assert_eq!(names, ["a.b/c=d"]);
        assert_eq!(grants.devices.aliases["fast"].to_string(), "a.b/c=*");
        assert!(read(&["device"]).unwrap().devices.all);
        for (grant, want) in [
            (
                "security.insecure",
                "--allow=security.insecure: network.host and devices",
            ),
            ("network.host=1", "network.host and devices"),
            ("device=", "it has no name"),
            (
                "device=/dev/nvidia0",
                "--allow=device=/dev/nvidia0: a device is given by its name",
            ),
            ("device=a.b/c,as=d", "\"as=d\" is not alias=NAME"),
        ] {
            let said = read(&[grant]).unwrap_err();
            assert!(said.contains(want), "{grant}: {said}");
        }
    }

    #[test]
    fn an_archive_is_told_from_a_dockerfile() {
        assert!(!looks_like_archive(b"FROM scratch\n"));
        assert!(!looks_like_archive(b""));
        assert!(looks_like_archive(&[0x1f, 0x8b, 8, 0]));
        let mut tar = vec![b'a'; 512];
        tar[257..262].copy_from_slice(b"ustar");
        assert!(looks_like_archive(&tar));
    }
}

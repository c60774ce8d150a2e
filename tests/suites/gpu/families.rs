//! Images of several distributions, each with the program /opens, which loads libraries by their names: to a loader they differ in
//! where the C library is, in the loader's configuration, and in which loader it is.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use harness::{World, cmd};

pub const ARCH: &str = std::env::consts::ARCH;

fn fixture(name: &str) -> PathBuf {
    harness::lab::repo().join("tests/fixtures/gpu-hooks").join(name)
}

/// Compiles a program or library of the fixtures.
pub fn compile(compiler: &str, args: &[&str], source: &str, out: &Path) -> Result<()> {
    let mut c = cmd::command(compiler, args);
    c.arg("-o").arg(out).arg(fixture(source));
    cmd::run(&mut c, Duration::from_secs(60))?
        .ok()
        .with_context(|| format!("{compiler} {source}"))?;
    Ok(())
}

/// What a distribution is to a loader.
pub struct Family {
    pub name: &'static str,
    /// Where its C library and loader are; the loader's own path is a link there where that differs.
    pub libc: String,
    pub files: &'static [(&'static str, &'static str)],
    pub musl: bool,
}

/// The distributions that images are of.
pub fn families() -> [Family; 4] {
    let multiarch = format!("lib/{ARCH}-linux-gnu");
    [
        Family {
            name: "debian",
            libc: multiarch.clone(),
            files: &[
                ("etc/debian_version", "13.1\n"),
                ("etc/ld.so.conf", "include /etc/ld.so.conf.d/*.conf\n"),
                ("etc/ld.so.conf.d/libc.conf", "/usr/local/lib\n"),
            ],
            musl: false,
        },
        Family {
            name: "ubi",
            libc: "usr/lib64".to_owned(),
            files: &[("etc/redhat-release", "Red Hat Enterprise Linux release 10\n")],
            musl: false,
        },
        Family {
            name: "distroless",
            libc: multiarch,
            files: &[],
            musl: false,
        },
        Family {
            name: "musl",
            libc: "lib".to_owned(),
            files: &[("etc/alpine-release", "3.23.0\n")],
            musl: true,
        },
    ]
}

/// Builds an image of the family with the program /opens in it, and what `more` puts into its tree; its name.
pub fn image(w: &World, family: &Family, more: impl FnOnce(&Path) -> Result<()>) -> Result<String> {
    let dir = w.lab.join(format!("context-{}", family.name));
    let root = dir.join("rootfs");
    let libc = root.join(&family.libc);
    std::fs::create_dir_all(&libc)?;
    if family.musl {
        compile("musl-gcc", &[], "opens.c", &root.join("opens"))?;
        let loader = format!("ld-musl-{ARCH}.so.1");
        std::fs::copy(Path::new("/lib").join(&loader), libc.join(&loader))?;
    } else {
        compile("cc", &[], "opens.c", &root.join("opens"))?;
        let of = |name: &str| cmd::sh(&format!("realpath $(cc -print-file-name={name})"));
        std::fs::copy(of("libc.so.6")?.trim(), libc.join("libc.so.6"))?;
        let (place, loader) = match ARCH {
            "aarch64" => ("lib", "ld-linux-aarch64.so.1"),
            _ => ("lib64", "ld-linux-x86-64.so.2"),
        };
        if family.libc == format!("usr/{place}") {
            std::os::unix::fs::symlink(&family.libc, root.join(place))?;
        } else {
            std::fs::create_dir_all(root.join(place))?;
        }
        std::fs::copy(of(loader)?.trim(), root.join(place).join(loader))?;
    }
    for (path, text) in family.files {
        let path = root.join(path);
        std::fs::create_dir_all(path.parent().context("a folder")?)?;
        std::fs::write(path, text)?;
    }
    more(&root)?;
    std::fs::write(dir.join("Dockerfile"), "FROM scratch\nCOPY rootfs/ /\n")?;
    let name = format!("slipway.test/{}:1", family.name);
    harness::image::run_slipway(&w.lab, &["build", "-t", &name, &dir.display().to_string()])?
        .ok()
        .with_context(|| format!("building {name}"))?;
    Ok(name)
}

//! The hooks of the CDI file, in the words that NVIDIA's own files use.

use std::path::Path;

use slipway_cdi::{Hook, Mount};

/// The hooks that every container with a GPU gets, done by the program at `program`: `driver` is the driver's version,
/// `mounts` are those of its files.
pub fn all(program: &Path, driver: &str, mounts: &[Mount]) -> Vec<Hook> {
    let mut hooks = Vec::new();
    if driver.contains('.') {
        hooks.push(hook(
            program,
            &["enable-cuda-compat", &format!("--host-driver-version={driver}")],
        ));
    }
    let folders = library_folders(mounts);
    let mut ldcache = vec!["update-ldcache"];
    for folder in &folders {
        ldcache.extend(["--folder", folder]);
    }
    hooks.push(hook(program, &ldcache));
    hooks.push(hook(program, &["disable-device-node-modification"]));
    hooks.push(hook(program, &["update-application-profile"]));
    hooks
}

/// Makes links of these names and targets, in the container.
pub fn links(program: &Path, links: &[(String, String)]) -> Hook {
    let links: Vec<String> = links
        .iter()
        .map(|(path, target)| format!("{target}::{path}"))
        .collect();
    let mut args = vec!["create-symlinks"];
    for link in &links {
        args.extend(["--link", link]);
    }
    hook(program, &args)
}

fn hook(program: &Path, args: &[&str]) -> Hook {
    let name = program.file_name().and_then(|n| n.to_str()).unwrap_or_default();
    // Each of the programs has these verbs at another place.
    let group = match name {
        "nvidia-cdi-hook" => None,
        "nvidia-ctk" => Some("hook"),
        _ => Some("cdi-hook"),
    };
    let words = std::iter::once(name).chain(group).chain(args.iter().copied());
    Hook {
        hook_name: "createContainer".to_owned(),
        path: program.display().to_string(),
        args: words.map(str::to_owned).collect(),
        ..Hook::default()
    }
}

/// Where the libraries are in the container, each folder once, in order.
pub fn library_folders(mounts: &[Mount]) -> Vec<&str> {
    let mut folders = Vec::new();
    for mount in mounts {
        let Some((folder, file)) = mount.container_path.rsplit_once('/') else {
            continue;
        };
        let is_library = file.starts_with("lib") && file.contains(".so");
        if is_library && !folders.contains(&folder) {
            folders.push(folder);
        }
    }
    folders
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whichever_program_does_them_they_are_recognised() {
        let mount = |path: &str| Mount {
            container_path: path.to_owned(),
            ..Mount::default()
        };
        let mounts = [
            mount("/usr/lib64/libcuda.so.1"),
            mount("/usr/lib64/libnvidia-ml.so.570.1"),
            mount("/usr/lib64/vdpau/libvdpau_nvidia.so.570.1"),
            mount("/usr/bin/nvidia-smi"),
        ];
        for program in ["/a/slipway-agent", "/b/nvidia-cdi-hook", "/c/nvidia-ctk"] {
            let hooks = all(Path::new(program), "570.86.15", &mounts);
            assert_eq!(hooks.len(), 4);
            let known = hooks
                .iter()
                .map(|h| slipway_hooks::recognise(Path::new(&h.path), &h.args));
            let known: Vec<_> = known.map(|h| h.expect("recognised")).collect();
            let wanted = ["/usr/lib64", "/usr/lib64/vdpau"].map(str::to_owned);
            assert!(
                matches!(&known[1], slipway_hooks::Hook::UpdateLdcache { folders, .. } if *folders == wanted),
                "{known:?}"
            );
            let path = "/dev/dri/by-path/pci-0000:65:00.0-card";
            let made = links(Path::new(program), &[(path.to_owned(), "../card1".to_owned())]);
            let known = slipway_hooks::recognise(Path::new(&made.path), &made.args);
            let wanted = [slipway_hooks::Link {
                target: "../card1".to_owned(),
                path: path.to_owned(),
            }];
            assert!(
                matches!(&known, Some(slipway_hooks::Hook::CreateSymlinks(links)) if *links == wanted),
                "{known:?}"
            );
        }
    }
}

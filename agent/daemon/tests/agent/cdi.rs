//! The CDI file, and the verbs around it.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use slipway_cdi::Spec;
use slipway_fake_gpu::Topology;

use crate::node::{Node, root};

fn generated(node: &Node) -> Spec {
    let spec = Spec::from_json(node.ok(&["cdi", "generate"]).as_bytes()).unwrap();
    spec.validate().unwrap();
    spec
}

fn names(spec: &Spec) -> Vec<&str> {
    spec.devices.iter().map(|d| d.name.as_str()).collect()
}

fn nodes<'a>(spec: &'a Spec, device: &str) -> Vec<&'a str> {
    let device = spec.devices.iter().find(|d| d.name == device).unwrap();
    device
        .container_edits
        .device_nodes
        .iter()
        .map(|n| n.path.as_str())
        .collect()
}

#[test]
fn the_default_configuration_is_printed_and_checked_and_unknown_keys_are_refused() {
    let node = Node::new("h200", "");
    std::fs::write(node.config(), node.ok(&["config", "default"])).unwrap();
    assert!(node.ok(&["config", "check"]).contains("valid"));
    // The flag stands before the verb or after it.
    let after = std::process::Command::new(env!("CARGO_BIN_EXE_slipway-agent"))
        .args(["config", "check", "--config"])
        .arg(node.config())
        .output()
        .unwrap();
    assert!(
        after.status.success(),
        "{}",
        String::from_utf8_lossy(&after.stderr)
    );
    std::fs::write(node.config(), "[driver]\nroots = \"/\"\n").unwrap();
    let out = node.run(&["config", "check"]);
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(
        !out.status.success() && said.contains("roots") && said.contains("agent.toml"),
        "{said}"
    );
}

#[test]
fn root_the_file_has_what_one_gpu_needs() {
    if !root() {
        return;
    }
    let node = Node::new("h200", "");
    let spec = generated(&node);
    let uuid = Topology::named("h200").unwrap().gpus[0].uuid.clone();
    assert_eq!(
        (spec.kind.as_str(), names(&spec)),
        ("nvidia.com/gpu", vec!["0", &uuid, "all"])
    );
    assert_eq!(
        nodes(&spec, "0"),
        ["/dev/nvidia0", "/dev/dri/card0", "/dev/dri/renderD128"]
    );
    let common = &spec.container_edits;
    assert_eq!(
        common.env,
        [
            "NVIDIA_VISIBLE_DEVICES=void",
            "NVIDIA_CTK_LIBCUDA_DIR=/usr/lib/x86_64-linux-gnu"
        ]
    );
    let all: Vec<_> = common.device_nodes.iter().map(|n| n.path.as_str()).collect();
    assert_eq!(
        all,
        [
            "/dev/nvidiactl",
            "/dev/nvidia-uvm",
            "/dev/nvidia-uvm-tools",
            "/dev/nvidia-modeset"
        ]
    );
    let driver = node.driver.root().display().to_string();
    let places: BTreeSet<&str> = common.mounts.iter().map(|m| m.container_path.as_str()).collect();
    for place in [
        "/usr/lib/x86_64-linux-gnu/libcuda.so.580.95.05",
        "/usr/lib/x86_64-linux-gnu/libcuda.so.1",
        "/usr/lib/x86_64-linux-gnu/libcuda.so",
        "/usr/lib/x86_64-linux-gnu/libnvidia-ml.so.1",
        // Named by its interface, not by the driver's version.
        "/usr/lib/x86_64-linux-gnu/libnvidia-nvvm70.so.4",
        "/usr/lib/x86_64-linux-gnu/vdpau/libvdpau_nvidia.so.1",
        "/usr/bin/nvidia-smi",
        "/lib/firmware/nvidia/580.95.05/gsp_ga10x.bin",
        "/etc/OpenCL/vendors/nvidia.icd",
    ] {
        assert!(places.contains(place), "{place} is not in {places:?}");
    }
    assert_eq!(places.len(), common.mounts.len(), "each place once");
    for mount in &common.mounts {
        assert!(mount.host_path.starts_with(&driver), "{mount:?}");
        assert!(mount.options.contains(&"ro".to_owned()) && mount.options.contains(&"nosuid".to_owned()));
    }
    let verbs: Vec<&str> = common.hooks.iter().map(|h| h.args[2].as_str()).collect();
    assert_eq!(
        verbs,
        [
            "enable-cuda-compat",
            "update-ldcache",
            "disable-device-node-modification",
            "update-application-profile"
        ]
    );
    assert!(common.hooks.iter().all(|h| h.path.ends_with("/slipway-agent")));
    // The names that a display's node is looked for by are its GPU's; what is no link there has none.
    let pci = &Topology::named("h200").unwrap().gpus[0].pci;
    let wanted: Vec<String> = ["card", "render"]
        .into_iter()
        .zip(["card0", "renderD128"])
        .flat_map(|(kind, node)| {
            let link = format!("../{node}::/dev/dri/by-path/pci-{pci}-{kind}");
            ["--link".to_owned(), link]
        })
        .collect();
    for device in &spec.devices {
        let [hook] = device.container_edits.hooks.as_slice() else {
            panic!("{device:?}");
        };
        assert_eq!(hook.args[1..3], ["cdi-hook", "create-symlinks"]);
        assert_eq!(hook.args[3..], wanted);
    }
}

#[test]
fn root_a_node_is_given_with_its_group_and_a_socket_can_be_spoken_to() {
    if !root() {
        return;
    }
    let node = Node::new("h200", "");
    let dev = node.driver.dev();
    // Nobody's but its group's; one that everybody may open asks for no group.
    for (name, gid) in [("dri/card0", 44), ("dri/renderD128", 105), ("nvidia-modeset", 44)] {
        std::os::unix::fs::chown(dev.join(name), None, Some(gid)).unwrap();
    }
    let daemon = node.driver.root().join("run/nvidia-persistenced");
    std::fs::create_dir_all(&daemon).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(daemon.join("socket")).unwrap();
    std::fs::create_dir_all(node.driver.root().join("tmp/nvidia-mps")).unwrap();
    let spec = generated(&node);
    for device in &spec.devices {
        assert_eq!(device.container_edits.additional_gids, [44, 105], "{device:?}");
    }
    assert!(spec.container_edits.additional_gids.is_empty());
    for (place, host) in [
        ("/run/nvidia-persistenced/socket", daemon.join("socket")),
        ("/tmp/nvidia-mps", node.driver.root().join("tmp/nvidia-mps")),
    ] {
        let mut mounts = spec.container_edits.mounts.iter();
        let mount = mounts.find(|m| m.container_path == place).unwrap();
        assert_eq!(mount.host_path, host.display().to_string());
        assert_eq!(
            mount.options,
            ["nosuid", "nodev", "noexec", "rbind", "rprivate"],
            "{place}"
        );
    }
    // The group 44 cannot be asked for where everybody may.
    std::fs::set_permissions(
        dev.join("nvidia-modeset"),
        std::os::unix::fs::PermissionsExt::from_mode(0o660),
    )
    .unwrap();
    assert_eq!(generated(&node).container_edits.additional_gids, [44]);
}

#[test]
fn root_libraries_are_found_in_lib64_and_where_the_loaders_configuration_says() {
    if !root() {
        return;
    }
    for (folder, configured) in [("usr/lib64", false), ("opt/driver/lib", true)] {
        let node = Node::new("h200", "");
        let top = node.driver.root();
        std::fs::create_dir_all(top.join(folder)).unwrap();
        std::fs::remove_dir(top.join(folder)).unwrap();
        std::fs::rename(top.join(slipway_fake_gpu::driver::LIBRARIES), top.join(folder)).unwrap();
        if configured {
            std::fs::create_dir_all(top.join("etc/ld.so.conf.d")).unwrap();
            std::fs::write(
                top.join("etc/ld.so.conf.d/driver.conf"),
                "# a driver's\n/opt/driver/lib\n",
            )
            .unwrap();
        }
        let spec = generated(&node);
        let common = &spec.container_edits;
        let places: BTreeSet<&str> = common.mounts.iter().map(|m| m.container_path.as_str()).collect();
        for name in [
            "libcuda.so.1",
            "libnvidia-nvvm70.so.4",
            "vdpau/libvdpau_nvidia.so.1",
        ] {
            let place = format!("/{folder}/{name}");
            assert!(places.contains(place.as_str()), "{place} is not in {places:?}");
        }
        assert_eq!(common.env[1], format!("NVIDIA_CTK_LIBCUDA_DIR=/{folder}"));
        let cache = common
            .hooks
            .iter()
            .find(|h| h.args[2] == "update-ldcache")
            .unwrap();
        assert_eq!(cache.args[3..5], ["--folder".to_owned(), format!("/{folder}")]);
    }
}

#[test]
fn root_nodes_of_other_drivers_are_given_where_they_are_asked_for_and_are_there() {
    if !root() {
        return;
    }
    let names = [
        "nvidia-fs0",
        "nvidia-fs10",
        "gdrdrv",
        "infiniband/rdma_cm",
        "infiniband/uverbs0",
        "infiniband/uverbs1",
        "nvidia-caps-imex-channels/channel0",
    ];
    let lay = |node: &Node| {
        for name in names
            .iter()
            .chain(&["infiniband/umad0", "nvidia-caps-imex-channels/channel1"])
        {
            let path = node.driver.dev().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            let device = rustix::fs::makedev(slipway_fake_gpu::driver::UVM_MAJOR, 77);
            let kind = rustix::fs::FileType::CharacterDevice;
            let mode = rustix::fs::Mode::from_raw_mode(0o666);
            rustix::fs::mknodat(rustix::fs::CWD, &path, kind, mode, device).unwrap();
            std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o666)).unwrap();
        }
        std::fs::create_dir_all(node.driver.root().join("run/udev")).unwrap();
        std::fs::write(node.driver.root().join("etc/cufile.json"), "{}\n").unwrap();
    };
    let given = |node: &Node| {
        let edits = generated(node).container_edits;
        let nodes: Vec<String> = edits.device_nodes.into_iter().skip(4).map(|n| n.path).collect();
        let files = edits.mounts.iter().map(|m| m.container_path.as_str());
        let files: Vec<&str> = files
            .filter(|p| p.contains("udev") || p.contains("cufile"))
            .collect();
        (nodes, files.join(" "))
    };
    let all = "[cdi]\nextra = [\"gds\", \"gdrcopy\", \"mofed\", \"imex\"]\n";
    let node = Node::new("h200", all);
    assert_eq!(given(&node), (Vec::new(), String::new()), "none is there");
    lay(&node);
    let wanted = names.map(|n| format!("/dev/{n}"));
    let (mut nodes, files) = given(&node);
    nodes.sort();
    let mut sorted = wanted.to_vec();
    sorted.sort();
    assert_eq!((nodes, files.as_str()), (sorted, "/run/udev /etc/cufile.json"));

    let node = Node::new("h200", "[cdi]\nextra = [\"gdrcopy\"]\n");
    lay(&node);
    assert_eq!(given(&node), (vec!["/dev/gdrdrv".to_owned()], String::new()));
    let node = Node::new("h200", "");
    lay(&node);
    assert_eq!(given(&node), (Vec::new(), String::new()), "none is asked for");
}

#[test]
fn root_devices_follow_minor_numbers_and_not_the_order() {
    if !root() {
        return;
    }
    let spec = generated(&Node::new("workstation", ""));
    assert_eq!(nodes(&spec, "0")[0], "/dev/nvidia1");
    assert_eq!(nodes(&spec, "1")[0], "/dev/nvidia0");
    assert_eq!(nodes(&spec, "all").len(), 6);
}

#[test]
fn root_a_mig_device_has_its_parents_node_and_its_two_capabilities() {
    if !root() {
        return;
    }
    let topology = Topology::named("a100x4-mig").unwrap();
    let spec = generated(&Node::new("a100x4-mig", ""));
    // 4 and 5 slices, 2 whole GPUs, each by two names, and all.
    assert_eq!(spec.devices.len(), (4 + 5 + 2) * 2 + 1);
    assert!(names(&spec).contains(&"1:5") && !names(&spec).contains(&"0"));
    let slice = &topology.gpus[1].mig.as_ref().unwrap().devices[4];
    // 3 + minor * 135 + gi * 9, and the compute instance's after it.
    let caps = 3 + 135 + slice.gi * 9;
    assert_eq!(
        nodes(&spec, &slice.uuid),
        [
            "/dev/nvidia1".to_owned(),
            format!("/dev/nvidia-caps/nvidia-cap{caps}"),
            format!("/dev/nvidia-caps/nvidia-cap{}", caps + 1)
        ]
    );
}

#[test]
fn root_the_file_is_written_whole_listed_and_validated() {
    if !root() {
        return;
    }
    let node = Node::new("h100x8", "");
    let folder = node.cdi().display().to_string();
    let file = node.ok(&["cdi", "generate", "--output", &folder]);
    assert!(
        node.ok(&["cdi", "validate", file.trim()])
            .contains("17 of nvidia.com/gpu")
    );
    let listed = node.ok(&["cdi", "list", "--spec-dir", &folder]);
    assert_eq!(listed.lines().count(), 17);
    assert!(listed.lines().any(|l| l == "nvidia.com/gpu=7"));
    let configured = node.ok(&["cdi", "list"]);
    assert!(
        configured.lines().any(|l| l == "nvidia.com/gpu=7"),
        "{configured}"
    );
    let left: Vec<_> = std::fs::read_dir(node.cdi()).unwrap().collect();
    assert_eq!(left.len(), 1, "nothing is left beside it: {left:?}");

    // A link in the place of the file that is being written is not followed.
    let precious = node.dir.path().join("precious");
    std::fs::write(&precious, "as it was").unwrap();
    std::os::unix::fs::symlink(&precious, node.cdi().join(".slipway-gpu.json.new")).unwrap();
    std::fs::remove_file(file.trim()).unwrap();
    node.ok(&["cdi", "generate", "--output", &folder]);
    assert_eq!(std::fs::read_to_string(&precious).unwrap(), "as it was");

    std::fs::write(node.cdi().join("bad.json"), "{}").unwrap();
    let out = node.run(&["cdi", "list", "--spec-dir", &folder]);
    assert!(!out.status.success() && String::from_utf8_lossy(&out.stderr).contains("bad.json"));
    assert_eq!(String::from_utf8_lossy(&out.stdout).lines().count(), 17);
    let out = node.run(&["cdi", "validate", &format!("{folder}/bad.json")]);
    assert!(!out.status.success());
    let said = |args: &[&str]| String::from_utf8(node.run(args).stderr).unwrap();
    let absent = node.dir.path().join("absent").display().to_string();
    assert!(said(&["cdi", "validate", &absent]).contains("No such file"));
    assert!(said(&["cdi", "list", "--spec-dir", &absent]).contains("no CDI file in"));
}

#[test]
fn root_what_is_missing_is_named() {
    if !root() {
        return;
    }
    let node = Node::new("h200", "");
    std::fs::remove_file(node.driver.dev().join("nvidia0")).unwrap();
    let out = node.run(&["cdi", "generate"]);
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(
        !out.status.success() && said.contains("nvidia0") && said.contains("GPU-"),
        "{said}"
    );
    assert!(said.contains("nvidia-modprobe -c 0"), "{said}");

    // What nobody has made, though the driver runs: no GPU can be used.
    let node = Node::new("h200", "");
    std::fs::remove_file(node.driver.dev().join("nvidia-uvm")).unwrap();
    let out = node.run(&["cdi", "generate"]);
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(
        !out.status.success() && said.contains("/nvidia-uvm") && said.contains("nvidia-modprobe -u -c 0"),
        "{said}"
    );
    // The same of a MIG device's capabilities costs that device only.
    let node = Node::new("a100x4-mig", "");
    let topology = Topology::named("a100x4-mig").unwrap();
    let slice = &topology.gpus[1].mig.as_ref().unwrap().devices[4];
    let capability = format!("nvidia-caps/nvidia-cap{}", 3 + 135 + slice.gi * 9);
    std::fs::remove_file(node.driver.dev().join(&capability)).unwrap();
    let out = node.run(&["cdi", "generate"]);
    let said = String::from_utf8_lossy(&out.stderr);
    let remedy = format!("capabilities/gpu1/mig/gi{}/access", slice.gi);
    assert!(
        out.status.success()
            && said.contains(&capability)
            && said.contains("nvidia-modprobe -f /")
            && said.contains(&remedy),
        "{said}"
    );

    let folder = node.dir.path().join("file");
    std::fs::write(&folder, "").unwrap();
    let node = Node::new("h200", "");
    let out = node.run(&["cdi", "generate", "--output", &folder.display().to_string()]);
    assert!(!out.status.success());

    std::fs::remove_dir_all(node.driver.root()).unwrap();
    for verb in [&["cdi", "generate"][..], &["list"]] {
        let said = String::from_utf8_lossy(&node.run(verb).stderr).into_owned();
        assert!(
            said.contains("libnvidia-ml.so.1") && said.contains("install NVIDIA's driver"),
            "{said}"
        );
    }
}

#[test]
fn a_driver_that_hangs_or_fails_is_an_error_within_its_deadline() {
    let node = Node::new("h100x8", "");
    node.driver.override_with(&["nvmlDeviceGetName hang 3"]).unwrap();
    let began = Instant::now();
    let out = node.run(&["list"]);
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(
        !out.status.success() && said.contains("no answer within 1500 ms"),
        "{said}"
    );
    assert!(began.elapsed() < Duration::from_secs(10));

    // One GPU that fails is left out; the others are there.
    node.driver.override_with(&["nvmlDeviceGetName 15 3"]).unwrap();
    let found: slipway_gpu::Inventory = serde_json::from_str(&node.ok(&["list"])).unwrap();
    assert_eq!(
        (found.gpus.len(), found.failed.len(), found.failed[0].index),
        (7, 1, 3)
    );

    // A driver that fails at everything.
    node.driver.override_with(&["* 999"]).unwrap();
    let out = node.run(&["list"]);
    assert!(!out.status.success());
}

#[test]
fn the_inventory_has_links_nodes_and_slices() {
    let node = Node::new("a100x4-mig", "");
    let found: slipway_gpu::Inventory = serde_json::from_str(&node.ok(&["list"])).unwrap();
    assert_eq!((found.driver.as_str(), found.cuda), ("550.163.01", (12, 4)));
    let gpu = &found.gpus[0];
    assert_eq!(
        (gpu.compute_capability, gpu.numa, gpu.mig),
        ((8, 0), Some(0), Some(true))
    );
    assert_eq!(gpu.links.peers.iter().map(|(_, n)| n).sum::<u32>(), 12);
    let slice = &gpu.mig_devices[1];
    assert_eq!((slice.profile.as_str(), slice.gi, slice.ci), ("2g.10gb", 3, 0));
    assert_eq!(found.gpus[2].mig, Some(false));
    let node = Node::new("h100x8", "");
    let found: slipway_gpu::Inventory = serde_json::from_str(&node.ok(&["list"])).unwrap();
    assert_eq!((found.gpus[0].links.switch, found.gpus[7].numa), (18, Some(1)));
    let node = Node::new("workstation", "");
    let found: slipway_gpu::Inventory = serde_json::from_str(&node.ok(&["list"])).unwrap();
    assert_eq!((found.gpus[1].numa, found.gpus[1].mig), (None, None));
}

//! What an image can and cannot bring into a container, and what mounts it is given.

#![allow(clippy::unwrap_used, reason = "a failing step ends the test")]

use slipway_spec::{ImageDefaults, Mount, Propagation, SpecInput, check_propagation, generate, volumes};

fn image(json: &str) -> ImageDefaults {
    let config: oci_spec::image::ImageConfiguration = serde_json::from_str(json).unwrap();
    ImageDefaults::from_config(&config)
}

const CONFIG: &str = r#"{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[]},"config":{
    "User":"","Env":["A=1","BARE","B=x=y"],"Entrypoint":["/e"],"Cmd":["c"],"WorkingDir":"/w",
    "Volumes":{"/data":{},"/cache/":{}},"StopSignal":"SIGWHAT",
    "Labels":{"io.kubernetes.cri.container-type":"sandbox","run.oci.handler":"wasm"}}}"#;

/// CVE-2026-53488.
#[test]
fn labels_of_an_image_reach_nothing_at_run_time() {
    let input = SpecInput {
        image: image(CONFIG),
        annotation_passthrough: vec!["*".into()],
        ..SpecInput::default()
    };
    let text = String::from_utf8(generate(&input).unwrap().to_json()).unwrap();
    assert!(!text.contains("sandbox") && !text.contains("run.oci") && !text.contains("annotations"));
}

#[test]
fn a_bad_stop_signal_of_an_image_is_told_and_replaced() {
    let out = generate(&SpecInput {
        image: image(CONFIG),
        ..SpecInput::default()
    })
    .unwrap();
    assert_eq!(
        (out.stop_signal.as_str(), out.stop_signal_number),
        ("SIGTERM", 15)
    );
    assert!(out.warnings.iter().any(|w| w.contains("SIGWHAT")));
}

#[test]
fn variables_without_a_value_are_passed_over_and_values_may_hold_equal_signs() {
    let out = generate(&SpecInput {
        image: image(CONFIG),
        ..SpecInput::default()
    })
    .unwrap();
    let env = out.spec.process().as_ref().unwrap().env().clone().unwrap();
    assert!(env.contains(&"B=x=y".to_owned()) && !env.iter().any(|e| e.starts_with("BARE")));
}

#[test]
fn volumes_are_listed_unless_something_is_mounted_there() {
    let mounts = [Mount {
        container_path: "/data/".into(),
        host_path: "/x".into(),
        ..Mount::default()
    }];
    assert_eq!(
        volumes(&image(CONFIG), &mounts).unwrap(),
        [std::path::PathBuf::from("/cache")]
    );
    assert_eq!(volumes(&image(CONFIG), &[]).unwrap().len(), 2);
}

/// CVE-2022-4318, CVE-2026-15809: there is no file into which a newline could break.
#[test]
fn a_newline_in_home_stays_in_the_environment() {
    let input = SpecInput {
        command: vec!["x".into()],
        envs: vec![("HOME".into(), "/root\nevil::0:0::/:/bin/sh".into())],
        ..SpecInput::default()
    };
    let out = generate(&input).unwrap();
    assert_eq!(out.user.home, "/");
    let process = out.spec.process().as_ref().unwrap();
    assert!(
        process
            .env()
            .as_ref()
            .unwrap()
            .iter()
            .any(|e| e == "HOME=/root\nevil::0:0::/:/bin/sh")
    );
}

#[test]
fn a_mount_that_propagates_needs_a_source_that_does() {
    let info = "22 1 0:20 / / rw shared:1 - ext4 /dev/vda rw\n\
                23 22 0:21 / /srv rw - tmpfs t rw\n\
                24 22 0:22 / /srv/slave\\040dir rw master:1 - tmpfs t rw\n";
    let check = |host: &str, propagation| {
        check_propagation(
            info,
            &[Mount {
                container_path: "/a".into(),
                host_path: host.into(),
                propagation,
                ..Mount::default()
            }],
        )
    };
    check("/home", Propagation::Bidirectional).unwrap();
    check("/home", Propagation::HostToContainer).unwrap();
    check("/srv/x", Propagation::Private).unwrap();
    check("/srv/x", Propagation::HostToContainer).unwrap_err();
    check("/srv/x", Propagation::Bidirectional).unwrap_err();
    check("/srv/slave dir/x", Propagation::HostToContainer).unwrap();
    check("/srv/slave dir/x", Propagation::Bidirectional).unwrap_err();
}

#[test]
fn the_same_wishes_give_the_same_bytes() {
    let input = SpecInput {
        image: image(CONFIG),
        seccomp: slipway_spec::Seccomp::RuntimeDefault,
        ..SpecInput::default()
    };
    let first = generate(&input).unwrap().to_json();
    for _ in 0..8 {
        assert_eq!(generate(&input).unwrap().to_json(), first);
    }
    let again: oci_spec::runtime::Spec = serde_json::from_slice(&first).unwrap();
    assert_eq!(again, generate(&input).unwrap().spec);
}

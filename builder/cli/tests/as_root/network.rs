//! RUN with a network of its own.

use rustix::process::Signal;

use crate::lab::{BASE, Lab, signal};

#[test]
fn a_stage_has_one_network_of_its_own_while_it_runs() {
    let Some(lab) = Lab::new() else { return };
    if !lab.network(31) {
        return;
    }
    let dir = lab.context(
        "c",
        &format!(
            "FROM {BASE} AS one\nRUN ip -o addr show eth0 && cat /proc/net/dev | wc -l\nRUN ip -o addr show eth0\n\
             FROM {BASE} AS two\nRUN ip -o addr show eth0 && sleep 1\n\
             FROM {BASE}\nCOPY --from=one /bin/sh /1\nCOPY --from=two /bin/sh /2\n\
             RUN --network=host ls /sys/class/net | wc -l\n"
        ),
    );
    let said = lab.build(&["--allow=network.host", &dir]).ok();
    let addresses: Vec<(&str, &str)> = said
        .out
        .lines()
        .filter(|l| l.contains("inet 10.211.31."))
        .filter_map(|l| Some((l.split(' ').next()?, l.split("inet ").nth(1)?.split('/').next()?)))
        .collect();
    assert_eq!(addresses.len(), 3, "{}", said.out);
    let of = |stage: &str| -> Vec<&str> {
        addresses
            .iter()
            .filter(|a| a.0.contains(stage))
            .map(|a| a.1)
            .collect()
    };
    assert_eq!(of("one")[0], of("one")[1], "one network for all steps of a stage");
    assert_ne!(of("one")[0], of("two")[0]);
    assert_eq!(lab.leases(), 0, "addresses are given back");
}

#[test]
fn a_dockerfile_cannot_give_itself_the_network_of_the_host() {
    let Some(lab) = Lab::new() else { return };
    let dir = lab.context(
        "c",
        &format!("FROM {BASE}\nRUN echo first ran\nRUN --network=host echo second ran\n"),
    );
    for flags in [&[][..], &["--network=none"], &["--network=default"]] {
        let said = lab.build(&[flags, &[&dir]].concat()).failed();
        assert!(
            said.err.contains("--allow=network.host"),
            "{flags:?}: {}",
            said.err
        );
        assert!(said.err.contains("Dockerfile:3"), "{}", said.err);
        assert!(!said.out.contains(" first ran"), "nothing runs: {}", said.out);
    }
    let unknown = lab.build(&["--allow=security.insecure", &dir]).failed();
    assert!(
        unknown.err.contains("--allow=security.insecure"),
        "{}",
        unknown.err
    );
    for flags in [
        &["--network=host"][..],
        &["--network=none", "--allow", "network.host"],
    ] {
        lab.build(&[flags, &[&dir]].concat()).ok();
    }
}

#[test]
fn the_network_of_a_killed_build_is_given_back_by_the_next_command() {
    let Some(lab) = Lab::new() else { return };
    if !lab.network(32) {
        return;
    }
    let dir = lab.context("c", &format!("FROM {BASE}\nRUN echo begun; sleep 600\n"));
    for sent in [Signal::INT, Signal::KILL] {
        let mut build = lab.start(&[&dir], "out");
        lab.wait_for("out", "begun");
        assert_eq!(lab.leases(), 1);
        signal(&build, sent);
        build.wait().unwrap();
        lab.run(&["images"]).ok();
        assert_eq!(lab.leases(), 0, "after {sent:?}");
        lab.clean();
    }
}

#[test]
fn a_build_that_cannot_run_anything_takes_no_network() {
    let Some(lab) = Lab::new() else { return };
    if !lab.network(33) {
        return;
    }
    let config = lab.write("config.toml", "[runtime]\nshim = \"/no/such/shim\"\n");
    let dir = lab.context("c", &format!("FROM {BASE}\nWORKDIR /w\nRUN true\n"));
    let said = lab.build(&["--config", config.to_str().unwrap(), &dir]).failed();
    assert!(said.err.contains("RUN needs the shim's programs"), "{}", said.err);
    assert!(said.err.contains("Dockerfile:3"), "{}", said.err);
    assert_eq!(lab.leases(), 0);
}

//! Forms of the language that only show when they run.

use crate::lab::{BASE, Lab};

#[test]
fn heredocs_run_and_are_copied() {
    let Some(lab) = Lab::new() else { return };
    let dir = lab.context(
        "c",
        &format!(
            "FROM {BASE}\nARG WHO=world\nRUN <<EOF\necho hello\necho again > /f\nEOF\n\
             RUN <<EOF\n#!/bin/sh\necho script $0\nEOF\n\
             COPY <<a.txt <<\"b.txt\" /docs/\nhello $WHO\na.txt\nraw $WHO\nb.txt\n"
        ),
    );
    let said = lab.build(&["-t", "t:1", &dir]).ok();
    assert!(
        said.out.contains("hello") && said.out.contains("script /dev/pipes/EOF"),
        "{}",
        said.out
    );
    assert_eq!(
        lab.look(
            "t:1",
            "cat /f /docs/a.txt /docs/b.txt; ls -A /dev | grep -c pipes || true"
        ),
        "again\nhello world\nraw $WHO\n0\n"
    );
}

#[test]
fn triggers_of_a_base_run_in_the_image_that_uses_it() {
    let Some(lab) = Lab::new() else { return };
    let parent = lab.context(
        "p",
        &format!("FROM {BASE}\nONBUILD COPY f /from-trigger\nONBUILD RUN echo triggered\n"),
    );
    lab.write("p/f", "parent's");
    lab.build(&["-t", "parent:1", &parent]).ok();
    let child = lab.context("c", "FROM parent:1\nRUN echo own\n");
    lab.write("c/f", "child's");
    let said = lab.build(&["-t", "child:1", &child]).ok();
    assert!(
        said.out.contains("triggered") && said.out.contains("own"),
        "{}",
        said.out
    );
    assert_eq!(lab.look("child:1", "cat /from-trigger"), "child's\n");
    assert!(lab.inspect("child:1")["config"]["OnBuild"].is_null());
}

#[test]
fn stdin_can_be_the_dockerfile_or_the_context() {
    let Some(lab) = Lab::new() else { return };
    let text = format!("FROM {BASE}\nRUN echo from stdin\n");
    let said = lab
        .fed(&["build", "--progress", "plain", "-"], text.as_bytes())
        .ok();
    assert!(said.out.contains("from stdin"), "{}", said.out);
    lab.write("c/f", "file");
    let dir = lab.path("c").display().to_string();
    let text = format!("FROM {BASE}\nCOPY f /f\nRUN cat /f\n");
    let said = lab
        .fed(
            &["build", "--progress", "plain", "-f", "-", &dir],
            text.as_bytes(),
        )
        .ok();
    assert!(said.out.contains("file"), "{}", said.out);
    let said = lab.fed(&["build", "-"], b"FROM scratch\nCOPY f /\n").failed();
    assert!(said.err.contains("build context"), "{}", said.err);

    lab.context("t", &format!("FROM {BASE}\nCOPY sub /sub\nRUN cat /sub/g\n"));
    lab.write("t/sub/g", "from the archive");
    let tar = std::process::Command::new("tar")
        .args(["cz", "."])
        .current_dir(lab.path("t"))
        .output()
        .unwrap();
    let said = lab.fed(&["build", "--progress", "plain", "-"], &tar.stdout).ok();
    assert!(said.out.contains("from the archive"), "{}", said.out);
}

#[test]
fn proxies_are_seen_by_run_and_stay_out_of_key_and_history() {
    let Some(lab) = Lab::new() else { return };
    let dir = lab.context("c", &format!("FROM {BASE}\nRUN echo proxy=$http_proxy\n"));
    let one = lab
        .build(&["-t", "t:1", "--build-arg", "http_proxy=http://user:pw@one", &dir])
        .ok();
    assert!(one.out.contains("proxy=http://user:pw@one"), "{}", one.out);
    let two = lab
        .build(&["-t", "t:2", "--build-arg", "http_proxy=http://two", &dir])
        .ok();
    assert!(two.out.contains("CACHED"), "{}", two.out);
    let history = lab
        .run(&["history", "--no-trunc", "--format", "json", "t:1"])
        .ok()
        .out;
    assert!(!history.contains("user:pw"), "{history}");
}

#[test]
fn no_network_means_loopback_only() {
    let Some(lab) = Lab::new() else { return };
    let dir = lab.context(
        "c",
        &format!("FROM {BASE}\nRUN --network=none ls /sys/class/net | tr '\\n' ,; ip addr show lo | grep -c 'inet 127'\nRUN hostname\n"),
    );
    let said = lab.build(&[&dir]).ok();
    assert!(said.out.contains("buildkitsandbox"), "{}", said.out);
    let said = lab.build(&["--network", "none", &dir]).ok();
    assert!(
        !said.out.contains("CACHED") || said.out.matches("CACHED").count() == 1,
        "{}",
        said.out
    );
}

#[test]
fn links_of_an_archive_as_context_lead_no_further_than_itself() {
    let Some(lab) = Lab::new() else { return };
    lab.write("outside", "FROM scratch\n");
    std::fs::create_dir_all(lab.path("t")).unwrap();
    std::os::unix::fs::symlink(lab.path("outside"), lab.path("t/Dockerfile")).unwrap();
    let tar = std::process::Command::new("tar")
        .args(["c", "."])
        .current_dir(lab.path("t"))
        .output()
        .unwrap();
    let said = lab.fed(&["build", "-"], &tar.stdout).failed();
    assert!(said.err.contains("there is no Dockerfile"), "{}", said.err);
}

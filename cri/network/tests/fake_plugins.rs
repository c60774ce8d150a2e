//! The protocol as plugins see it, with a plugin that writes down what it is asked and misbehaves
//! as told. Needs no privileges: the namespace is the test's own and nobody enters it.

#![allow(clippy::unwrap_used, reason = "a failing step ends the test")]

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use slipway_network::{
    Attachment, Cni, CniError, NetworkStatus, PluginError, PodNetwork, PortMapping, Protocol,
};

struct Lab {
    dir: tempfile::TempDir,
    cni: Cni,
}

impl Lab {
    /// A folder of plugins `names`, and a network of all of them.
    fn new(names: &[&str]) -> Lab {
        let plugins: Vec<Value> = names.iter().map(|n| json!({"type": n})).collect();
        let lab = Lab::empty(names);
        lab.conflist(&json!({"cniVersion": "1.0.0", "name": "lab", "plugins": plugins}));
        lab
    }

    fn empty(names: &[&str]) -> Lab {
        let dir = tempfile::tempdir().unwrap();
        let (conf, bin) = (dir.path().join("net.d"), dir.path().join("bin"));
        fs::create_dir(&conf).unwrap();
        fs::create_dir(&bin).unwrap();
        let fake = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/plugins/fake");
        for name in names {
            std::os::unix::fs::symlink(&fake, bin.join(name)).unwrap();
        }
        let cni = Cni::with_deadline(
            conf,
            vec![dir.path().join("nowhere"), bin],
            Duration::from_secs(2),
        );
        Lab { dir, cni }
    }

    fn bin(&self, file: &str) -> PathBuf {
        self.dir.path().join("bin").join(file)
    }

    fn conflist(&self, value: &Value) {
        fs::write(self.dir.path().join("net.d/10-lab.conflist"), value.to_string()).unwrap();
    }

    /// Makes a plugin do something else on a command.
    fn script(&self, plugin: &str, command: &str, shell: &str) {
        fs::write(self.bin(&format!("{plugin}.{command}")), shell).unwrap();
    }

    /// What was asked so far: "name COMMAND".
    fn log(&self) -> Vec<String> {
        let text = fs::read_to_string(self.bin("log")).unwrap_or_default();
        text.lines()
            .map(|l| l.split(' ').take(2).collect::<Vec<_>>().join(" "))
            .collect()
    }

    fn stdin(&self, plugin: &str, command: &str) -> Value {
        serde_json::from_slice(&fs::read(self.bin(&format!("{plugin}.{command}.stdin"))).unwrap()).unwrap()
    }
}

fn pod(id: &str) -> PodNetwork {
    PodNetwork {
        id: id.into(),
        name: "web-0".into(),
        namespace: "default".into(),
        uid: "1-2-3".into(),
        netns: "/proc/self/ns/net".into(),
        ..PodNetwork::default()
    }
}

fn port(host_port: u16, container_port: u16, host_ip: &str) -> PortMapping {
    PortMapping {
        host_port,
        container_port,
        protocol: Protocol::Tcp,
        host_ip: host_ip.into(),
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let source = error
        .source()
        .map(|s| format!(": {}", chain(s)))
        .unwrap_or_default();
    format!("{error}{source}")
}

#[tokio::test]
async fn add_runs_the_plugins_in_order_and_del_in_reverse_with_the_final_result() {
    let lab = Lab::new(&["one", "two"]);
    let attachment = lab.cni.add(&pod("c1")).await.unwrap();
    assert_eq!(attachment.ips, ["10.9.0.2".parse::<std::net::IpAddr>().unwrap()]);
    assert!(lab.stdin("one", "ADD").get("prevResult").is_none());
    assert_eq!(lab.stdin("two", "ADD")["prevResult"]["by"], "one");
    assert_eq!(lab.stdin("two", "ADD")["name"], "lab");

    lab.cni.check(&attachment).await.unwrap();
    lab.cni.del(&attachment).await.unwrap();
    lab.cni.del(&attachment).await.unwrap();
    assert_eq!(
        lab.log(),
        [
            "one ADD",
            "two ADD",
            "one CHECK",
            "two CHECK",
            "two DEL",
            "one DEL",
            "two DEL",
            "one DEL"
        ]
    );
    for plugin in ["one", "two"] {
        assert_eq!(lab.stdin(plugin, "DEL")["prevResult"]["by"], "two");
    }
}

#[tokio::test]
async fn plugins_get_the_capabilities_they_declare_and_a_clean_environment() {
    let lab = Lab::empty(&["main", "portmap"]);
    lab.conflist(&json!({"cniVersion": "1.0.0", "name": "lab", "plugins": [
        {"type": "main", "own": {"kept": [1, 2]}, "runtimeConfig": {"left": "out"}},
        {"type": "portmap", "capabilities": {"portMappings": true, "bandwidth": true, "dns": false}}]}));
    let mut pod = pod("c1");
    pod.port_mappings = vec![port(80, 8080, "")];
    lab.cni.add(&pod).await.unwrap();
    let main = lab.stdin("main", "ADD");
    assert_eq!(main["own"], json!({"kept": [1, 2]}));
    assert!(main.get("runtimeConfig").is_none());
    let portmap = lab.stdin("portmap", "ADD");
    assert_eq!(
        portmap["runtimeConfig"],
        json!({"portMappings": [{"hostPort": 80, "containerPort": 8080, "protocol": "tcp"}]})
    );
    assert!(portmap.get("capabilities").is_none());

    let env = fs::read_to_string(lab.bin("main.env")).unwrap();
    let names: Vec<&str> = env.lines().filter_map(|l| l.split('=').next()).collect();
    let shells_own = ["PWD", "SHLVL", "_", "OLDPWD"];
    assert!(
        names
            .iter()
            .all(|n| n.starts_with("CNI_") || *n == "PATH" || shells_own.contains(n)),
        "{names:?}"
    );
    assert!(env.contains("CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web-0;K8S_POD_INFRA_CONTAINER_ID=c1;K8S_POD_UID=1-2-3"));
    assert!(env.contains("CNI_IFNAME=eth0") && env.contains("CNI_NETNS=/proc/self/ns/net"));
}

#[tokio::test]
async fn a_limit_of_descriptors_that_was_raised_is_not_a_plugin_s() {
    slipway_sys::exec::raise_descriptors().unwrap();
    let lab = Lab::empty(&["main"]);
    lab.conflist(&json!({"cniVersion": "1.0.0", "name": "lab", "plugins": [{"type": "main"}]}));
    lab.script("main", "DEL", r#"ulimit -Sn > "$dir/limit""#);
    let attachment = lab.cni.add(&pod("c1")).await.unwrap();
    lab.cni.del(&attachment).await.unwrap();
    let hard = rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum;
    let usual = hard.unwrap_or(1024).min(1024);
    assert_eq!(
        fs::read_to_string(lab.bin("limit")).unwrap(),
        format!("{usual}\n")
    );
}

#[tokio::test]
async fn a_failing_add_is_undone_and_its_error_reads_as_a_sentence() {
    let lab = Lab::new(&["one", "two", "three"]);
    lab.script(
        "two",
        "ADD",
        r#"echo '{"code":7,"msg":"subnet too small","details":"10.0.0.0/31"}'; exit 1"#,
    );
    let error = lab.cni.add(&pod("c1")).await.unwrap_err();
    assert_eq!(
        chain(&error),
        r#"ADD lab: CNI plugin "two": subnet too small (code 7): 10.0.0.0/31"#
    );
    assert_eq!(
        lab.log(),
        ["one ADD", "two ADD", "three DEL", "two DEL", "one DEL"]
    );
    assert_eq!(lab.stdin("one", "DEL")["prevResult"]["by"], "one");
}

#[tokio::test]
async fn an_add_that_cannot_be_undone_says_so_after_asking_every_plugin() {
    let lab = Lab::new(&["one", "two", "three"]);
    lab.script("two", "ADD", r#"echo '{"code":7,"msg":"no"}'; exit 1"#);
    // Those that were never reached do not matter, nor the same refusal once more.
    lab.script("three", "DEL", "exit 1");
    lab.script("two", "DEL", r#"echo '{"code":7,"msg":"no"}'; exit 1"#);
    let error = lab.cni.add(&pod("c1")).await.unwrap_err();
    assert!(matches!(error, CniError::Plugin { .. }), "{}", chain(&error));

    lab.script("one", "DEL", r#"echo '{"code":11,"msg":"busy"}'; exit 1"#);
    let plan = lab.cni.plan(&pod("c2")).await.unwrap();
    let error = lab.cni.attach(plan.clone()).await.unwrap_err();
    assert!(
        matches!(error, CniError::NotUndone { .. }) && chain(&error).contains("busy"),
        "{}",
        chain(&error)
    );
    // DEL of what was never complete asks all of them, whatever one says.
    fs::remove_file(lab.bin("log")).unwrap();
    lab.cni.del(&plan).await.unwrap_err();
    assert_eq!(lab.log(), ["three DEL", "two DEL", "one DEL"]);
}

#[tokio::test]
async fn a_plugin_that_dies_without_an_answer_is_told_with_what_it_wrote() {
    let lab = Lab::new(&["one"]);
    lab.script("one", "ADD", "echo first >&2; echo second >&2; exit 3");
    let text = chain(&lab.cni.add(&pod("c1")).await.unwrap_err());
    assert!(
        text.ends_with("exit status 3, without an error message; it wrote: first; second"),
        "{text}"
    );
    lab.script("one", "ADD", "kill -9 $$");
    let text = chain(&lab.cni.add(&pod("c1")).await.unwrap_err());
    assert!(text.contains("killed by signal 9"), "{text}");
}

#[tokio::test]
async fn a_plugin_that_hangs_is_killed_with_what_it_started() {
    let lab = Lab::new(&["one"]);
    lab.script(
        "one",
        "ADD",
        r#"sleep 300 & echo $! > "$dir/child"; echo waiting >&2; wait"#,
    );
    let error = lab.cni.add(&pod("c1")).await.unwrap_err();
    assert!(
        matches!(
            &error,
            CniError::Plugin {
                source: PluginError::Timeout { .. },
                ..
            }
        ),
        "{error}"
    );
    assert!(error.is_transient() && chain(&error).contains("it wrote: waiting"));
    assert_gone(&lab.bin("child")).await;
}

#[tokio::test]
async fn a_caller_that_gives_up_leaves_no_plugin_behind() {
    let lab = Lab::new(&["one"]);
    lab.script("one", "ADD", r#"sleep 300 & echo $! > "$dir/child"; wait"#);
    let given_up = tokio::time::timeout(Duration::from_millis(700), lab.cni.add(&pod("c1"))).await;
    assert!(given_up.is_err());
    assert_gone(&lab.bin("child")).await;
    // Nor does it block the next one.
    fs::remove_file(lab.bin("one.ADD")).unwrap();
    lab.cni.add(&pod("c1")).await.unwrap();
}

async fn assert_gone(pid_file: &Path) {
    let pid = fs::read_to_string(pid_file).unwrap();
    let stat = PathBuf::from(format!("/proc/{}/stat", pid.trim()));
    for _ in 0..100 {
        // A zombie that init has not collected yet is as good as gone.
        let text = fs::read_to_string(&stat).unwrap_or_default();
        if text.is_empty() || text.contains(") Z ") {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("process {} is still there", pid.trim());
}

#[tokio::test]
async fn output_without_end_is_cut_and_refused() {
    let lab = Lab::new(&["one"]);
    lab.script(
        "one",
        "ADD",
        "head -c 5000000 /dev/zero; head -c 5000000 /dev/zero >&2",
    );
    let error = lab.cni.add(&pod("c1")).await.unwrap_err();
    assert!(
        matches!(
            &error,
            CniError::Plugin {
                source: PluginError::TooMuchOutput { .. },
                ..
            }
        ),
        "{}",
        chain(&error)
    );
    lab.script("one", "ADD", "head -c 5000000 /dev/zero | tr '\\0' x >&2; exit 1");
    let text = chain(&lab.cni.add(&pod("c1")).await.unwrap_err());
    assert!(text.len() < 6000, "{}", text.len());
}

#[tokio::test]
async fn what_is_not_a_result_is_refused_and_undone() {
    let lab = Lab::new(&["one"]);
    for answer in [
        "echo hello",
        "true",
        r#"echo '{"ips":[{"address":"x"}]}'"#,
        r#"echo '{"interfaces":[]}'"#,
    ] {
        lab.script("one", "ADD", answer);
        lab.cni.add(&pod("c1")).await.unwrap_err();
        assert_eq!(lab.log().last().unwrap(), "one DEL", "{answer}");
    }
}

#[tokio::test]
async fn a_child_that_keeps_the_output_open_is_not_waited_for() {
    let lab = Lab::new(&["one"]);
    let answer = r#"sleep 3 & echo '{"ips":[{"address":"10.9.0.3/24"}]}'"#;
    lab.script("one", "ADD", answer);
    let began = Instant::now();
    let attachment = lab.cni.add(&pod("c1")).await.unwrap();
    assert_eq!(attachment.ips.len(), 1);
    assert!(
        began.elapsed() < Duration::from_millis(1500),
        "{:?}",
        began.elapsed()
    );
}

#[tokio::test]
async fn del_works_from_the_record_when_configuration_and_namespace_are_gone() {
    let lab = Lab::new(&["one"]);
    let attachment = lab.cni.add(&pod("c1")).await.unwrap();
    let record = serde_json::to_string(&attachment).unwrap();
    fs::remove_file(lab.dir.path().join("net.d/10-lab.conflist")).unwrap();
    let record = record.replace(
        "/proc/self/ns/net",
        &lab.bin("not-a-namespace").display().to_string(),
    );
    fs::write(lab.bin("not-a-namespace"), "").unwrap();
    let attachment: Attachment = serde_json::from_str(&record).unwrap();
    lab.cni.del(&attachment).await.unwrap();
    assert_eq!(lab.stdin("one", "DEL")["prevResult"]["by"], "one");
    assert!(
        fs::read_to_string(lab.bin("log"))
            .unwrap()
            .ends_with("one DEL c1 netns=unset\n")
    );
}

#[tokio::test]
async fn a_plan_can_be_recorded_before_and_undone_without_add() {
    let lab = Lab::new(&["one"]);
    let plan = lab.cni.plan(&pod("c1")).await.unwrap();
    assert!(lab.log().is_empty() && !plan.complete && plan.raw_result().is_none());
    let kept: Attachment = serde_json::from_str(&serde_json::to_string(&plan).unwrap()).unwrap();
    assert_eq!(kept, plan);
    lab.cni.del(&kept).await.unwrap();
    assert!(lab.cni.attach(kept).await.unwrap().complete);
}

#[tokio::test]
async fn a_record_of_an_unknown_version_is_refused() {
    let lab = Lab::new(&["one"]);
    let mut value = serde_json::to_value(lab.cni.plan(&pod("c1")).await.unwrap()).unwrap();
    value["version"] = json!(2);
    let future: Attachment = serde_json::from_value(value).unwrap();
    assert!(matches!(
        lab.cni.del(&future).await,
        Err(CniError::AttachmentVersion(2))
    ));
}

#[tokio::test]
async fn del_stops_at_the_first_failure_and_takes_unknown_containers_as_done() {
    let lab = Lab::new(&["one", "two"]);
    let attachment = lab.cni.add(&pod("c1")).await.unwrap();
    lab.script("two", "DEL", r#"echo '{"code":11,"msg":"busy"}'; exit 1"#);
    let error = lab.cni.del(&attachment).await.unwrap_err();
    assert!(error.is_transient());
    assert!(!lab.log().contains(&"one DEL".to_owned()));
    lab.script(
        "two",
        "DEL",
        r#"echo '{"code":3,"msg":"unknown container"}'; exit 1"#,
    );
    lab.cni.del(&attachment).await.unwrap();
    assert!(lab.log().contains(&"one DEL".to_owned()));
}

#[tokio::test]
async fn a_missing_plugin_makes_the_network_not_ready_and_del_fail_until_it_is_back() {
    let lab = Lab::new(&["one"]);
    let attachment = lab.cni.add(&pod("c1")).await.unwrap();
    fs::rename(lab.bin("one"), lab.bin("away")).unwrap();
    let NetworkStatus::NotReady { reason } = lab.cni.status() else {
        panic!("ready")
    };
    assert!(reason.contains("\"one\" is not in"), "{reason}");
    let error = lab.cni.del(&attachment).await.unwrap_err();
    assert!(matches!(error, CniError::PluginMissing { .. }) && error.is_transient());
    // Nothing is begun that cannot be finished.
    assert!(matches!(
        lab.cni.add(&pod("c2")).await,
        Err(CniError::PluginMissing { .. })
    ));
    assert_eq!(lab.log(), ["one ADD"]);
    fs::rename(lab.bin("away"), lab.bin("one")).unwrap();
    assert_eq!(
        lab.cni.status(),
        NetworkStatus::Ready {
            network: "lab".into()
        }
    );
    lab.cni.del(&attachment).await.unwrap();
}

#[tokio::test]
async fn without_a_configuration_nothing_is_ready_until_one_appears() {
    let lab = Lab::empty(&["one"]);
    assert!(
        matches!(lab.cni.status(), NetworkStatus::NotReady { reason } if reason.contains("no network configuration"))
    );
    assert!(matches!(
        lab.cni.add(&pod("c1")).await,
        Err(CniError::NotReady { .. })
    ));
    lab.conflist(&json!({"cniVersion": "0.4.0", "name": "lab", "plugins": [{"type": "one"}]}));
    assert_eq!(
        lab.cni.status(),
        NetworkStatus::Ready {
            network: "lab".into()
        }
    );
    lab.cni.add(&pod("c1")).await.unwrap();
}

#[tokio::test]
async fn check_is_asked_only_where_the_protocol_and_the_configuration_have_it() {
    for (config, asked) in [
        (json!({"cniVersion": "0.3.1"}), false),
        (json!({"cniVersion": "0.4.0"}), true),
        (json!({"cniVersion": "0.4.0", "disableCheck": true}), false),
    ] {
        let lab = Lab::empty(&["one"]);
        let mut config = config;
        config["name"] = json!("lab");
        config["plugins"] = json!([{"type": "one"}]);
        lab.conflist(&config);
        let attachment = lab.cni.add(&pod("c1")).await.unwrap();
        lab.cni.check(&attachment).await.unwrap();
        assert_eq!(lab.log().contains(&"one CHECK".to_owned()), asked, "{config}");
        lab.cni.del(&attachment).await.unwrap();
        assert_eq!(
            lab.stdin("one", "DEL").get("prevResult").is_some(),
            asked || config["disableCheck"] == true
        );
    }
}

#[tokio::test]
async fn the_newest_version_that_all_plugins_know_is_spoken_and_asked_for_once() {
    let lab = Lab::empty(&["one", "two"]);
    lab.conflist(
        &json!({"cniVersion": "0.4.0", "cniVersions": ["1.1.0", "1.0.0"], "name": "lab",
                         "plugins": [{"type": "one"}, {"type": "two"}]}),
    );
    lab.script(
        "two",
        "VERSION",
        r#"echo '{"supportedVersions":["0.3.1","0.4.0","1.0.0"]}'"#,
    );
    for id in ["c1", "c2"] {
        assert_eq!(lab.cni.add(&pod(id)).await.unwrap().cni_version(), "1.0.0");
    }
    assert_eq!(lab.stdin("one", "ADD")["cniVersion"], "1.0.0");
    assert_eq!(lab.log().iter().filter(|l| l.ends_with("VERSION")).count(), 2);
}

#[tokio::test]
async fn plugins_without_a_common_version_are_told() {
    let lab = Lab::empty(&["one"]);
    lab.conflist(&json!({"cniVersions": ["1.1.0", "1.0.0"], "name": "lab", "plugins": [{"type": "one"}]}));
    lab.script("one", "VERSION", r#"echo '{"supportedVersions":["0.4.0"]}'"#);
    let error = lab.cni.add(&pod("c1")).await.unwrap_err().to_string();
    assert!(
        error.contains("1.1.0, 1.0.0") && error.contains("one: 0.4.0"),
        "{error}"
    );
}

#[tokio::test]
async fn plugins_of_1_1_are_asked_for_their_status_and_told_what_is_valid() {
    let lab = Lab::empty(&["one"]);
    lab.conflist(&json!({"cniVersion": "1.1.0", "name": "lab", "plugins": [{"type": "one"}]}));
    assert_eq!(
        lab.cni.probe().await,
        NetworkStatus::Ready {
            network: "lab".into()
        }
    );
    lab.script(
        "one",
        "STATUS",
        r#"echo '{"code":50,"msg":"no addresses left"}'; exit 1"#,
    );
    assert!(
        matches!(lab.cni.probe().await, NetworkStatus::NotReady { reason } if reason.contains("no addresses left"))
    );
    assert!(
        matches!(lab.cni.status(), NetworkStatus::NotReady { reason } if reason.contains("no addresses left"))
    );

    let valid = lab.cni.add(&pod("c1")).await.unwrap();
    lab.cni.gc("somebody-elses", Vec::new).await.unwrap();
    assert!(!lab.log().contains(&"one GC".to_owned()));
    lab.cni.gc("lab", || vec![valid]).await.unwrap();
    assert_eq!(
        lab.stdin("one", "GC")["cni.dev/valid-attachments"],
        json!([{"containerID": "c1", "ifname": "eth0"}])
    );

    lab.conflist(
        &json!({"cniVersion": "1.1.0", "disableGC": true, "name": "lab", "plugins": [{"type": "one"}]}),
    );
    lab.cni.gc("lab", Vec::new).await.unwrap();
    assert_eq!(lab.log().iter().filter(|l| *l == "one GC").count(), 1);
}

#[tokio::test]
async fn collecting_waits_for_a_slow_check_and_nobody_waits_for_collecting() {
    let lab = Lab::empty(&["one"]);
    lab.conflist(&json!({"cniVersion": "1.1.0", "name": "lab", "plugins": [{"type": "one"}]}));
    let first = lab.cni.add(&pod("c1")).await.unwrap();
    let go = lab.bin("go");
    lab.script(
        "one",
        "CHECK",
        &format!("while [ ! -e {} ]; do sleep 0.01; done", go.display()),
    );
    let check = lab.cni.check(&first);
    let gc = async {
        while !lab.log().contains(&"one CHECK".to_owned()) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        lab.cni.gc("lab", Vec::new).await
    };
    let others = async {
        while !lab.log().contains(&"one CHECK".to_owned()) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        // Collecting waits by now, or will when it comes to it: the check ends behind this.
        for _ in 0..3 {
            tokio::time::sleep(Duration::from_millis(20)).await;
            let second = lab.cni.add(&pod("c2")).await.unwrap();
            lab.cni.del(&second).await.unwrap();
        }
        assert!(!lab.log().contains(&"one GC".to_owned()));
        fs::write(&go, "").unwrap();
    };
    let (checked, collected, ()) = tokio::join!(check, gc, others);
    checked.unwrap();
    collected.unwrap();
    assert!(lab.log().contains(&"one GC".to_owned()));
}

#[tokio::test]
async fn arguments_that_cni_cannot_carry_are_refused_before_anything_runs() {
    let lab = Lab::new(&["one"]);
    for broken in [
        PodNetwork {
            id: "../x".into(),
            ..pod("c")
        },
        PodNetwork {
            id: String::new(),
            ..pod("c")
        },
        PodNetwork {
            name: "a;K8S_POD_NAMESPACE=kube-system".into(),
            ..pod("c")
        },
        PodNetwork {
            netns: "ns".into(),
            ..pod("c")
        },
        PodNetwork {
            netns: "/etc/passwd".into(),
            ..pod("c")
        },
        PodNetwork {
            port_mappings: vec![port(80, 0, "")],
            ..pod("c")
        },
        PodNetwork {
            port_mappings: vec![port(80, 80, "everywhere")],
            ..pod("c")
        },
    ] {
        assert!(
            matches!(lab.cni.add(&broken).await, Err(CniError::Argument { .. })),
            "{broken:?}"
        );
    }
    assert!(lab.log().is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_containers_operations_take_turns_and_different_ones_do_not_wait() {
    let lab = Lab::new(&["one"]);
    let end = r#"echo end >> "$dir/log"; echo '{"ips":[{"address":"10.9.0.3/24"}]}'"#;
    // Each goes on once both have begun.
    let both = r#"n=0; while [ $(grep -c ADD "$dir/log") -lt 2 ] && [ $n -lt 400 ]; do n=$((n+1)); sleep 0.05; done; "#;
    lab.script("one", "ADD", &format!("{both}{end}"));
    let (cni, other) = (lab.cni.clone(), lab.cni.clone());
    let (a, b) = (pod("c1"), pod("c2"));
    let (x, y) = tokio::join!(cni.add(&a), other.add(&b));
    x.unwrap();
    y.unwrap();
    assert_eq!(lab.log(), ["one ADD", "one ADD", "end", "end"]);

    lab.script("one", "ADD", &format!("sleep 0.4; {end}"));
    fs::remove_file(lab.bin("log")).unwrap();
    let (x, y) = tokio::join!(cni.add(&a), other.add(&a));
    x.unwrap();
    y.unwrap();
    assert_eq!(lab.log(), ["one ADD", "end", "one ADD", "end"]);
}

//! Limits written into directories that look like cgroups: what each version gets for the same OCI resources.
#![allow(clippy::unwrap_used)] // a failure is a failed test

use slipway_sys::cgroup::{Cgroup, CgroupError, CgroupPath, Layout, Resources};
use std::fs;
use std::path::{Path, PathBuf};

struct Fixture {
    dir: tempfile::TempDir,
    cgroup: Cgroup,
}

impl Fixture {
    fn v2(files: &[(&str, &str)]) -> Fixture {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().join("a/b");
        fs::create_dir_all(&at).unwrap();
        for (name, value) in files {
            fs::write(at.join(name), value).unwrap();
        }
        let cgroup = Cgroup::open(&Layout::at(&[], Some(dir.path())), &path()).unwrap();
        Fixture { dir, cgroup }
    }

    fn v1(controllers: &[(&str, &[(&str, &str)])]) -> Fixture {
        let dir = tempfile::tempdir().unwrap();
        let mounts: Vec<(&str, PathBuf)> = controllers
            .iter()
            .map(|(c, _)| (*c, dir.path().join(c)))
            .collect();
        for ((_, files), (_, mount)) in controllers.iter().zip(&mounts) {
            fs::create_dir_all(mount.join("a/b")).unwrap();
            for (name, value) in *files {
                fs::write(mount.join("a/b").join(name), value).unwrap();
            }
        }
        let borrowed: Vec<(&str, &Path)> = mounts.iter().map(|(c, m)| (*c, m.as_path())).collect();
        let cgroup = Cgroup::open(&Layout::at(&borrowed, None), &path()).unwrap();
        Fixture { dir, cgroup }
    }

    fn apply(&self, json: &str) -> Result<(), CgroupError> {
        self.cgroup.apply(&Resources::from_json(json).unwrap())
    }

    fn read(&self, path: &str) -> String {
        fs::read_to_string(self.dir.path().join(path)).unwrap()
    }
}

fn path() -> CgroupPath {
    CgroupPath::parse("/a/b").unwrap()
}

const V2: &[(&str, &str)] = &[
    ("memory.max", "max"),
    ("memory.swap.max", "max"),
    ("memory.low", "0"),
    ("memory.high", "max"),
    ("memory.oom.group", "0"),
    ("memory.current", "5000"),
    ("cpu.weight", "100"),
    ("cpu.max", "max 100000"),
    ("cpu.idle", "0"),
    ("cpuset.cpus", ""),
    ("cpuset.mems", ""),
    ("pids.max", "max"),
    ("io.weight", ""),
    ("io.max", ""),
    ("hugetlb.2MB.max", "max"),
];

#[test]
fn v2_gets_what_kubelet_sends() {
    let f = Fixture::v2(V2);
    f.apply(
        r#"{"memory":{"limit":104857600,"swap":157286400,"reservation":1000,"disableOOMKiller":false},
            "cpu":{"shares":512,"quota":50000,"period":100000,"cpus":"0-1","mems":"0"},"pids":{"limit":100},
            "hugepageLimits":[{"pageSize":"2MB","limit":0},{"pageSize":"1GB","limit":0}],
            "unified":{"memory.high":"max","memory.oom.group":"1","memory.zswap.max":"max"},
            "blockIO":{"weight":500,"throttleReadBpsDevice":[{"major":8,"minor":0,"rate":1024}]},"devices":[]}"#,
    )
    .unwrap();
    for (file, expected) in [
        ("memory.max", "104857600"),
        ("memory.swap.max", "52428800"),
        ("memory.low", "1000"),
        ("memory.oom.group", "1"),
        ("cpu.weight", "59"),
        ("cpu.max", "50000 100000"),
        ("cpuset.cpus", "0-1"),
        ("pids.max", "100"),
        ("hugetlb.2MB.max", "0"),
        ("io.weight", "default 4950"),
        ("io.max", "8:0 rbps=1024"),
    ] {
        assert_eq!(f.read(&format!("a/b/{file}")), expected, "{file}");
    }
    assert!(
        !f.dir.path().join("a/b/hugetlb.1GB.max").exists(),
        "a zero limit without its file is dropped"
    );
}

#[test]
fn v2_limits_block_devices_one_by_one_and_says_what_it_lacks() {
    let f = Fixture::v2(&[("io.bfq.weight", ""), ("io.max", "")]);
    for (what, file, expected) in [
        (r#""weight":500"#, "io.bfq.weight", "500"),
        (
            r#""weightDevice":[{"major":8,"minor":16,"weight":300}]"#,
            "io.bfq.weight",
            "8:16 300",
        ),
        (
            r#""throttleWriteBpsDevice":[{"major":8,"minor":0,"rate":2048}]"#,
            "io.max",
            "8:0 wbps=2048",
        ),
        (
            r#""throttleReadIOPSDevice":[{"major":8,"minor":0,"rate":7}]"#,
            "io.max",
            "8:0 riops=7",
        ),
        (
            r#""throttleWriteIOPSDevice":[{"major":8,"minor":0,"rate":0}]"#,
            "io.max",
            "8:0 wiops=max",
        ),
    ] {
        f.apply(&format!("{{\"blockIO\":{{{what}}}}}")).unwrap();
        assert_eq!(f.read(&format!("a/b/{file}")), expected, "{what}");
    }
    let none = Fixture::v2(&[("pids.max", "max")]);
    let error = none
        .apply(r#"{"blockIO":{"weight":500}}"#)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("blockIO.weight") && error.contains("io.weight"),
        "{error}"
    );
}

#[test]
fn v2_updates_take_the_other_half_from_what_is_in_force() {
    let f = Fixture::v2(V2);
    f.apply(r#"{"cpu":{"quota":20000,"period":50000}}"#).unwrap();
    f.apply(r#"{"cpu":{"quota":30000}}"#).unwrap();
    assert_eq!(f.read("a/b/cpu.max"), "30000 50000");
    f.apply(r#"{"cpu":{"period":60000}}"#).unwrap();
    assert_eq!(f.read("a/b/cpu.max"), "30000 60000");
    f.apply(r#"{"cpu":{"quota":-1}}"#).unwrap();
    assert_eq!(f.read("a/b/cpu.max"), "max 60000");
    f.apply(r#"{"memory":{"limit":1000000}}"#).unwrap();
    f.apply(r#"{"memory":{"swap":1500000}}"#).unwrap();
    assert_eq!(f.read("a/b/memory.swap.max"), "500000");
    f.apply(r#"{"memory":{"limit":-1}}"#).unwrap();
    assert_eq!(
        (
            f.read("a/b/memory.max").as_str(),
            f.read("a/b/memory.swap.max").as_str()
        ),
        ("max", "max")
    );
    assert!(f.apply(r#"{"memory":{"limit":2000000,"swap":1000000}}"#).is_err());
    assert!(
        f.apply(r#"{"memory":{"limit":4096,"checkBeforeUpdate":true}}"#)
            .is_err(),
        "5000 bytes are in use"
    );
}

#[test]
fn a_limit_without_its_controller_is_an_error_that_names_the_key() {
    let f = Fixture::v2(&[("pids.max", "max")]);
    for (json, key) in [
        (r#"{"memory":{"limit":1}}"#, "memory.limit"),
        (r#"{"cpu":{"shares":2}}"#, "cpu.shares"),
        (r#"{"cpu":{"quota":1000}}"#, "cpu.quota"),
        (r#"{"cpu":{"cpus":"0"}}"#, "cpu.cpus"),
        (
            r#"{"hugepageLimits":[{"pageSize":"2MB","limit":1}]}"#,
            "hugepageLimits.2MB",
        ),
        (r#"{"unified":{"memory.high":"100"}}"#, "unified.memory.high"),
        (r#"{"unified":{"../memory.high":"0"}}"#, "unified.../memory.high"),
        (r#"{"unified":{"cgroup.procs":"1"}}"#, "unified.cgroup.procs"),
        (
            r#"{"hugepageLimits":[{"pageSize":"../x","limit":0}]}"#,
            "hugepageLimits",
        ),
        (r#"{"rdma":{"mlx5":{"hcaHandles":3}}}"#, "rdma.mlx5"),
        (r#"{"network":{"classID":3}}"#, "network"),
        (
            r#"{"memory":{"disableOOMKiller":true}}"#,
            "memory.disableOOMKiller",
        ),
    ] {
        match f.apply(json) {
            Err(CgroupError::Unsupported { key: k, .. }) => assert_eq!(k, key),
            other => panic!("{json}: {other:?}"),
        }
    }
    f.apply(
        r#"{"memory":{"limit":-1,"swap":-1,"disableOOMKiller":false},"cpu":{"quota":-1,"shares":0,"cpus":""},
            "unified":{"memory.high":"max"},"network":{"classID":0},"pids":{"limit":0}}"#,
    )
    .unwrap();
    assert_eq!(f.read("a/b/pids.max"), "max", "0 pids is unset");
}

#[test]
fn v1_keeps_memory_below_memory_and_swap_whichever_way_they_move() {
    let max = "9223372036854771712";
    let f = Fixture::v1(&[(
        "memory",
        &[
            ("memory.limit_in_bytes", max),
            ("memory.memsw.limit_in_bytes", max),
        ],
    )]);
    let both = |f: &Fixture| {
        let read = |n: &str| f.read(&format!("memory/a/b/memory.{n}limit_in_bytes"));
        (read(""), read("memsw."))
    };
    f.apply(r#"{"memory":{"limit":1000,"swap":1500}}"#).unwrap();
    assert_eq!(both(&f), ("1000".into(), "1500".into()));
    // A raise of the limit alone keeps the 500 bytes of swap.
    f.apply(r#"{"memory":{"limit":4000}}"#).unwrap();
    assert_eq!(both(&f), ("4000".into(), "4500".into()));
    f.apply(r#"{"memory":{"limit":100}}"#).unwrap();
    assert_eq!(both(&f), ("100".into(), "4500".into()));
    f.apply(r#"{"memory":{"limit":-1}}"#).unwrap();
    assert_eq!(both(&f), ("-1".into(), "-1".into()));
}

#[test]
fn v1_gets_devices_and_drops_hugepages_of_zero() {
    let f = Fixture::v1(&[
        ("devices", &[("devices.allow", ""), ("devices.deny", "")]),
        (
            "cpu,cpuacct",
            &[
                ("cpu.shares", ""),
                ("cpu.cfs_quota_us", ""),
                ("cpu.cfs_period_us", ""),
            ],
        ),
        ("pids", &[("pids.max", "")]),
    ]);
    f.apply(
        r#"{"devices":[{"allow":false,"access":"rwm"},{"allow":true,"type":"c","major":1,"minor":3,"access":"rwm"}],
            "cpu":{"shares":1,"quota":-1,"period":100000},"pids":{"limit":-1},
            "hugepageLimits":[{"pageSize":"2MB","limit":0}]}"#,
    )
    .unwrap();
    assert_eq!(f.read("devices/a/b/devices.deny"), "a");
    assert_eq!(f.read("devices/a/b/devices.allow"), "c 1:3 rwm");
    assert_eq!(f.read("cpu,cpuacct/a/b/cpu.shares"), "2");
    assert_eq!(f.read("pids/a/b/pids.max"), "max");
    let e = f
        .apply(r#"{"hugepageLimits":[{"pageSize":"2MB","limit":2097152}]}"#)
        .unwrap_err();
    assert!(e.to_string().contains("hugepageLimits.2MB"), "{e}");
}

#[test]
fn systemd_is_refused_on_v1_in_words() {
    let dir = tempfile::tempdir().unwrap();
    let layout = Layout::at(&[("memory", dir.path())], None);
    let e = Cgroup::create(&layout, &CgroupPath::parse("system.slice:slipway:x").unwrap()).unwrap_err();
    assert!(matches!(e, CgroupError::SystemdOnV1));
}

#[test]
fn v2_statistics_are_read() {
    let f = Fixture::v2(&[
        ("memory.current", "1000"),
        ("memory.max", "max"),
        (
            "memory.stat",
            "anon 300\nfile 600\ninactive_file 400\nfile_mapped 7\npgfault 9\npgmajfault 2\n",
        ),
        ("memory.events", "low 0\nmax 4\noom 1\noom_kill 1\n"),
        (
            "cpu.stat",
            "usage_usec 5\nuser_usec 3\nsystem_usec 2\nnr_periods 8\nnr_throttled 1\nthrottled_usec 6\n",
        ),
        ("cgroup.procs", "12\n13\n0\n"),
        ("pids.current", "5"),
        ("pids.max", "100"),
        ("cpu.pressure", "some avg10=1.00 avg60=0.00 avg300=0.00 total=3\n"),
        ("io.stat", "8:0 rbytes=10 wbytes=20 rios=1 wios=2\n"),
    ]);
    let s = f.cgroup.stats().unwrap();
    assert_eq!(
        (s.memory_usage, s.memory_working_set, s.memory_rss, s.memory_limit),
        (1000, 600, 300, 0)
    );
    assert_eq!((s.cpu_usage_ns, s.cpu_throttled_ns, s.oom_kills), (5000, 6000, 1));
    assert_eq!((s.pids, s.pids_limit, s.processes, s.threads), (5, 100, 2, 5));
    assert_eq!(s.cpu_psi.unwrap().some.total_us, 3);
    assert_eq!(s.io[0].write_bytes, 20);
    assert!(s.memory_psi.is_none());
}

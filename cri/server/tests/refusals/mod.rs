//! Configurations that are wrong in one field.

use slipway_cri_api::v1;

/// The field's name, as an answer has to have it, and what makes it wrong.
pub type Change<T> = (&'static str, Box<dyn Fn(&mut T)>);

macro_rules! changes {
    ($to:ident: $($field:literal => $change:expr;)+) => {
        vec![$(($field, Box::new(|$to: &mut _| { $change; })),)+]
    };
}

pub fn huge() -> String {
    "x".repeat(10 << 20)
}

fn pod_security(p: &mut v1::PodSandboxConfig) -> &mut v1::LinuxSandboxSecurityContext {
    p.linux.as_mut().unwrap().security_context.as_mut().unwrap()
}

fn pod_namespaces(p: &mut v1::PodSandboxConfig) -> &mut v1::NamespaceOption {
    pod_security(p).namespace_options.as_mut().unwrap()
}

fn linux(c: &mut v1::ContainerConfig) -> &mut v1::LinuxContainerConfig {
    c.linux.get_or_insert_default()
}

fn resources(c: &mut v1::ContainerConfig) -> &mut v1::LinuxContainerResources {
    linux(c).resources.get_or_insert_default()
}

fn security(c: &mut v1::ContainerConfig) -> &mut v1::LinuxContainerSecurityContext {
    linux(c).security_context.get_or_insert_default()
}

fn namespaces(c: &mut v1::ContainerConfig) -> &mut v1::NamespaceOption {
    security(c).namespace_options.get_or_insert_default()
}

fn mount(change: impl Fn(&mut v1::Mount)) -> v1::Mount {
    let mut mount = v1::Mount {
        container_path: "/a".into(),
        host_path: "/tmp".into(),
        ..Default::default()
    };
    change(&mut mount);
    mount
}

pub fn bad_pods() -> Vec<Change<v1::PodSandboxConfig>> {
    changes! { p:
        "metadata.name" => p.metadata.as_mut().unwrap().name = "a\nb".into();
        "annotations" => drop(p.annotations.insert("a".into(), "x".repeat(10 << 20)));
        "labels" => drop(p.labels.insert("a\nb".into(), String::new()));
        "log_directory" => p.log_directory = "/var/log/../../etc".into();
        "hostname" => p.hostname = "x\ny".into();
        "cgroup_parent" => p.linux.as_mut().unwrap().cgroup_parent = "/a/../../b".into();
        "sysctls" => drop(p.linux.as_mut().unwrap().sysctls.insert("kernel.shm\n".into(), "1".into()));
        "port_mappings" => p.port_mappings = vec![v1::PortMapping { host_port: 1, container_port: -1, ..Default::default() }];
        "namespace_options" => pod_namespaces(p).ipc = 77;
        "resources" => p.linux.as_mut().unwrap().resources = Some(v1::LinuxContainerResources { memory_limit_in_bytes: -7, ..Default::default() });
        "metadata.uid" => p.metadata.as_mut().unwrap().uid = "a\nb".into();
        "metadata.namespace" => p.metadata.as_mut().unwrap().namespace = "a\nb".into();
        "metadata.name" => p.metadata.as_mut().unwrap().name = huge();
        "config.metadata" => p.metadata = None;
        "labels" => drop(p.labels.insert("a".into(), huge()));
        "log_directory" => p.log_directory = format!("/var/log/{}", "x".repeat(300));
        "log_directory" => p.log_directory = "relative".into();
        "hostname" => p.hostname = huge();
        "dns_config" => p.dns_config.get_or_insert_default().searches = vec!["x".repeat(1000); 100];
        "dns_config.servers" => p.dns_config.get_or_insert_default().servers = vec!["1.1.1.1\nnameserver 6.6.6.6".into()];
        "dns_config.options" => p.dns_config.get_or_insert_default().options = vec![String::new()];
        "port_mappings.protocol" => p.port_mappings = vec![v1::PortMapping { host_port: 1, container_port: 1, protocol: 9, ..Default::default() }];
        "port_mappings.host_port" => p.port_mappings = vec![v1::PortMapping { host_port: 70_000, container_port: 1, ..Default::default() }];
        "port_mappings.host_ip" => p.port_mappings = vec![v1::PortMapping { host_port: 1, container_port: 1, host_ip: huge(), ..Default::default() }];
        "port_mappings.protocol" => p.port_mappings = vec![v1::PortMapping { container_port: 1, protocol: 9, ..Default::default() }];
        "port_mappings.container_port" => p.port_mappings = vec![v1::PortMapping { container_port: -1, ..Default::default() }];
        "port_mappings.host_ip" => p.port_mappings = vec![v1::PortMapping { container_port: 1, host_ip: huge(), ..Default::default() }];
        "port_mappings.host_port" => p.port_mappings = vec![v1::PortMapping { host_port: -1, container_port: 1, ..Default::default() }];
        "security_context.seccomp" => pod_security(p).seccomp = Some(v1::SecurityProfile { profile_type: 9, ..Default::default() });
        "security_context.seccomp" => pod_security(p).seccomp = Some(v1::SecurityProfile { profile_type: 2, localhost_ref: "/a/../b".into() });
        "security_context.seccomp" => { #[allow(deprecated)] { pod_security(p).seccomp_profile_path = format!("localhost/{}", huge()); } };
        "security_context.apparmor" => pod_security(p).apparmor = Some(v1::SecurityProfile { profile_type: 9, ..Default::default() });
        "security_context.apparmor" => pod_security(p).apparmor = Some(v1::SecurityProfile { profile_type: 2, localhost_ref: "a\nb".into() });
        "selinux_options" => pod_security(p).selinux_options = Some(v1::SeLinuxOption { level: "s0\nx".into(), ..Default::default() });
        "run_as_user" => pod_security(p).run_as_user = Some(v1::Int64Value { value: -1 });
        "run_as_group" => pod_security(p).run_as_group = Some(v1::Int64Value { value: 1 << 32 });
        "supplemental_groups" => pod_security(p).supplemental_groups = vec![5, -5];
        "supplemental_groups_policy" => pod_security(p).supplemental_groups_policy = 9;
        "cgroup_parent" => p.linux.as_mut().unwrap().cgroup_parent = format!("/a/{}", "x".repeat(300));
        "sysctls" => drop(p.linux.as_mut().unwrap().sysctls.insert("net.ipv4.ip_forward".into(), "1\n2".into()));
        "overhead" => p.linux.as_mut().unwrap().overhead = Some(v1::LinuxContainerResources { cpu_quota: -9, ..Default::default() });
        "namespace_options.network" => pod_namespaces(p).network = 1;
        "namespace_options.pid" => pod_namespaces(p).pid = 3;
        "userns_options" => pod_namespaces(p).userns_options = Some(v1::UserNamespace { mode: 9, ..Default::default() });
        "userns_options" => { let map = v1::IdMapping { container_id: 0, host_id: u32::MAX, length: 2 }; pod_namespaces(p).userns_options = Some(v1::UserNamespace { mode: 0, uids: vec![map], gids: vec![map] }); };
    }
}

/// What is looked at of a pod's configuration that comes with a container or an image.
pub fn bad_sandbox_configs() -> Vec<Change<v1::PodSandboxConfig>> {
    changes! { p:
        "sandbox_config.annotations" => drop(p.annotations.insert("a".into(), huge()));
        "sandbox_config.labels" => drop(p.labels.insert("a\nb".into(), String::new()));
        "sandbox_config.metadata.name" => p.metadata.as_mut().unwrap().name = "a\nb".into();
        "sandbox_config.metadata.uid" => p.metadata.as_mut().unwrap().uid = huge();
        "sandbox_config.metadata.namespace" => p.metadata.as_mut().unwrap().namespace = "a\nb".into();
    }
}

/// Of an image whose name is good.
pub fn bad_images() -> Vec<Change<v1::ImageSpec>> {
    changes! { i:
        "annotations" => drop(i.annotations.insert("a".into(), huge()));
        "annotations" => drop(i.annotations.insert("a\nb".into(), String::new()));
        "user_specified_image" => i.user_specified_image = "a\nb".into();
        "runtime_handler" => i.runtime_handler = huge();
        "image_ref" => i.image_ref = "a\nb".into();
    }
}

pub fn bad_containers() -> Vec<Change<v1::ContainerConfig>> {
    changes! { c:
        "metadata.name" => c.metadata.as_mut().unwrap().name = "a\nb".into();
        "annotations" => drop(c.annotations.insert("a".into(), "x".repeat(10 << 20)));
        "log_path" => c.log_path = "../../etc/passwd".into();
        "stop_signal" => c.stop_signal = 4711;
        "command" => c.command = vec!["a\0b".into()];
        "cpu_period" => resources(c).cpu_period = -1;
        "memory_limit" => resources(c).memory_limit_in_bytes = -2;
        "oom_score_adj" => resources(c).oom_score_adj = 5000;
        "unified" => drop(resources(c).unified.insert("../x".into(), "1".into()));
        "run_as_user" => security(c).run_as_user = Some(v1::Int64Value { value: -1 });
        "supplemental group" => security(c).supplemental_groups = vec![-5];
        "supplemental_groups_policy" => security(c).supplemental_groups_policy = 9;
        "mounts" => c.mounts = vec![v1::Mount { container_path: "/a/../../b".into(), host_path: "/tmp".into(), ..Default::default() }];
        "mounts" => c.mounts = vec![v1::Mount { container_path: "/a".into(), host_path: "/tmp".into(), propagation: 12, ..Default::default() }];
        "mount_options" => c.mounts = vec![v1::Mount { container_path: "/a".into(), host_path: "/tmp".into(), mount_options: vec!["lowerdir=/".into()], ..Default::default() }];
        "devices" => c.devices = vec![v1::Device { host_path: "/dev/null".into(), container_path: "/dev/x".into(), permissions: "rwx".into() }];
        "config.metadata" => c.metadata = None;
        "config.image" => c.image = None;
        "config.image" => c.image.get_or_insert_default().image = "busybox\n:1".into();
        "config.image" => c.image.get_or_insert_default().image = huge();
        "config.image" => drop(c.image.get_or_insert_default().annotations.insert("a".into(), huge()));
        "labels" => drop(c.labels.insert(String::new(), "a".into()));
        "working_dir" => c.working_dir = "/a\0".into();
        "working_dir" => c.working_dir = format!("/{}", "x/".repeat(4000));
        "args" => c.args = vec!["a\0".into()];
        "command" => c.command = vec![huge()];
        "args" => c.args = vec!["x".repeat(100_000); 30];
        "envs" => c.envs = vec![v1::KeyValue { key: "a=b".into(), value: vec![] }];
        "envs" => { c.envs = vec![v1::KeyValue { key: "a".into(), value: vec![b'x'; 200_000] }] };
        "log_path" => c.log_path = format!("{}.log", "x".repeat(300));
        "CDI_devices" => c.cdi_devices = vec![v1::CdiDevice { name: "a/b=c\n".into() }];
        "cpu_quota" => resources(c).cpu_quota = -7;
        "cpu_shares" => resources(c).cpu_shares = -1;
        "memory_swap_limit" => resources(c).memory_swap_limit_in_bytes = -9;
        "cpuset_cpus" => resources(c).cpuset_cpus = "0\n1".into();
        "cpuset_mems" => resources(c).cpuset_mems = "../0".into();
        "hugepage_limits" => resources(c).hugepage_limits = vec![v1::HugepageLimit { page_size: "../2MB".into(), limit: 1 }];
        "run_as_group" => security(c).run_as_group = Some(v1::Int64Value { value: 5 });
        "run_as_username" => security(c).run_as_username = "a\nb".into();
        "masked_paths" => security(c).masked_paths = vec!["relative".into()];
        "readonly_paths" => security(c).readonly_paths = vec!["/proc/../etc".into()];
        "seccomp" => security(c).seccomp = Some(v1::SecurityProfile { profile_type: 9, ..Default::default() });
        "seccomp" => security(c).seccomp = Some(v1::SecurityProfile { profile_type: 2, localhost_ref: "/no/such.json".into() });
        "seccomp" => security(c).seccomp = Some(v1::SecurityProfile { profile_type: 2, localhost_ref: "/a/../b".into() });
        "apparmor" => security(c).apparmor = Some(v1::SecurityProfile { profile_type: 9, ..Default::default() });
        "apparmor" => security(c).apparmor = Some(v1::SecurityProfile { profile_type: 2, localhost_ref: "a\nb".into() });
        "selinux_options" => security(c).selinux_options = Some(v1::SeLinuxOption { user: "a\nb".into(), ..Default::default() });
        "capabilit" => security(c).capabilities = Some(v1::Capability { add_capabilities: vec!["CAP_NO\nSUCH".into()], ..Default::default() });
        "namespace_options.pid" => namespaces(c).pid = 9;
        "namespace_options.ipc" => namespaces(c).ipc = -1;
        "target_id" => { namespaces(c).pid = 3; namespaces(c).target_id = "../x".into(); };
        "mounts" => c.mounts = vec![mount(|m| m.host_path = "/tmp/../etc".into())];
        "container_path" => c.mounts = vec![mount(|m| m.container_path = "/x".repeat(3000))];
        "container_path" => c.mounts = vec![mount(|m| m.container_path = "/a\0".into())];
        "mounts" => c.mounts = vec![mount(|m| { m.image = Some(v1::ImageSpec { image: "x".into(), ..Default::default() }) })];
        "mounts.image" => { c.mounts = vec![mount(|m| { m.host_path.clear(); m.image = Some(v1::ImageSpec { image: "a\nb".into(), ..Default::default() }); })] };
        "image_sub_path" => { c.mounts = vec![mount(|m| { m.host_path.clear(); m.image = Some(v1::ImageSpec { image: "x".into(), ..Default::default() }); m.image_sub_path = "../etc".into(); })] };
        "uid_mappings" => c.mounts = vec![mount(|m| { m.uid_mappings = vec![v1::IdMapping { container_id: 0, host_id: 0, length: 1 }] })];
        "recursive_read_only" => c.mounts = vec![mount(|m| m.recursive_read_only = true)];
        "devices" => c.devices = vec![v1::Device { host_path: "/dev/../dev/null".into(), ..Default::default() }];
        "devices" => c.devices = vec![v1::Device { host_path: "/dev/no-such-device".into(), ..Default::default() }];
    }
}

pub fn bad_limits() -> Vec<Change<v1::LinuxContainerResources>> {
    changes! { r:
        "memory_limit" => r.memory_limit_in_bytes = -2;
        "memory_swap_limit" => r.memory_swap_limit_in_bytes = -2;
        "cpu_period" => r.cpu_period = -1;
        "cpu_quota" => r.cpu_quota = -2;
        "cpu_shares" => r.cpu_shares = i64::MIN;
        "oom_score_adj" => r.oom_score_adj = -1001;
    }
}

/// Limits that only the kernel's files forbid.
pub fn bad_values() -> Vec<Change<v1::LinuxContainerResources>> {
    changes! { r:
        "cpuset_cpus" => r.cpuset_cpus = "0\n1".into();
        "cpu_period" => r.cpu_period = 7;
        "unified" => drop(r.unified.insert("../x".into(), "1".into()));
        "hugepage_limits" => r.hugepage_limits = vec![v1::HugepageLimit { page_size: "a\nb".into(), limit: 0 }];
    }
}

pub fn bad_auths() -> Vec<Change<v1::AuthConfig>> {
    changes! { a:
        "auth" => a.auth = "###".into();
        "auth.password" => a.password = huge();
        "auth.registry_token" => a.registry_token = "a\r\nHost: b".into();
        "auth.identity_token" => a.identity_token = "a\nb".into();
    }
}

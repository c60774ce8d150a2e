//! The library as a program sees it that was made for the real one: loaded by path, through nvml-wrapper.
#![allow(clippy::unwrap_used)] // a failure is a failed test

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use nvml_wrapper::Nvml;
use nvml_wrapper::bitmasks::event::EventTypes;
use nvml_wrapper::enum_wrappers::device::{Clock, TemperatureSensor, TopologyLevel};
use nvml_wrapper::enums::event::XidError;
use nvml_wrapper::error::NvmlError;
use slipway_fake_gpu::{Driver, FOLDER, Topology};

/// Each test is a process of its own: the folder is the process's, and so is the library. Runs `body` in a child that has
/// the variable set from its start.
fn in_child(test: &str, topology: &str, body: impl FnOnce(&Driver, &Nvml)) {
    if let Some(dir) = std::env::var_os(FOLDER) {
        let dir = Path::new(&dir).parent().unwrap();
        let driver = Driver::lay_out(dir, &Topology::named(topology).unwrap()).unwrap();
        let nvml = Nvml::builder()
            .lib_path(driver.library().as_os_str())
            .init()
            .unwrap();
        return body(&driver, &nvml);
    }
    let dir = tempfile::tempdir().unwrap();
    let out = Command::new(std::env::current_exe().unwrap())
        .arg0("abi")
        .args([test, "--exact", "--nocapture"])
        .env(FOLDER, dir.path().join("nvml"))
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&out.stdout);
    assert!(
        out.status.success(),
        "{text}\n{}",
        String::from_utf8_lossy(&out.stderr)
    );
    assert!(text.contains("1 passed"), "{text}");
}

#[test]
fn one_gpu_is_described_in_full() {
    in_child("one_gpu_is_described_in_full", "h200", |_, nvml| {
        assert_eq!(nvml.sys_driver_version().unwrap(), "580.95.05");
        assert_eq!(nvml.sys_cuda_driver_version().unwrap(), 13000);
        assert_eq!(nvml.device_count().unwrap(), 1);
        let gpu = nvml.device_by_index(0).unwrap();
        assert_eq!(gpu.name().unwrap(), "NVIDIA H200");
        assert!(gpu.uuid().unwrap().starts_with("GPU-"));
        assert_eq!(gpu.minor_number().unwrap(), 0);
        let pci = gpu.pci_info().unwrap();
        assert_eq!((pci.bus_id.as_str(), pci.bus), ("00000000:19:00.0", 0x19));
        let memory = gpu.memory_info().unwrap();
        assert_eq!(memory.total, 143_771 << 20);
        let cc = gpu.cuda_compute_capability().unwrap();
        assert_eq!((cc.major, cc.minor), (9, 0));
        assert_eq!(gpu.temperature(TemperatureSensor::Gpu).unwrap(), 38);
        assert_eq!(gpu.clock_info(Clock::Memory).unwrap(), 3201);
        assert_eq!(gpu.power_usage().unwrap(), 76_000);
        assert_eq!(gpu.running_compute_processes().unwrap().len(), 0);
        assert_eq!(gpu.mig_mode().unwrap().current, 0);
        assert!(nvml.device_by_index(1).is_err());
        assert_eq!(
            nvml.device_by_uuid(gpu.uuid().unwrap()).unwrap().index().unwrap(),
            0
        );
    });
}

#[test]
fn topology_levels_and_links_tell_neighbours_from_strangers() {
    in_child(
        "topology_levels_and_links_tell_neighbours_from_strangers",
        "h100x8",
        |_, nvml| {
            let gpus: Vec<_> = (0..8).map(|n| nvml.device_by_index(n).unwrap()).collect();
            let level = |a: usize, b: u32| {
                gpus[a]
                    .topology_common_ancestor(nvml.device_by_index(b).unwrap())
                    .unwrap()
            };
            assert_eq!(level(0, 3), TopologyLevel::Node);
            assert_eq!(level(0, 4), TopologyLevel::System);
            let link = gpus[2].link_wrapper_for(17);
            assert!(link.is_active().unwrap());
            assert_eq!(link.remote_pci_info().unwrap().bus, 0x0a);
            assert!(gpus[2].link_wrapper_for(18).is_active().is_err());
            assert_eq!(gpus[7].numa_node_id().unwrap(), 1);
        },
    );
}

#[test]
fn mig_devices_have_slots_with_holes_and_follow_a_change_of_geometry() {
    let name = "mig_devices_have_slots_with_holes_and_follow_a_change_of_geometry";
    in_child(name, "a100x4-mig", |driver, nvml| {
        let gpu = nvml.device_by_index(0).unwrap();
        assert_eq!(
            (gpu.mig_mode().unwrap().current, gpu.mig_device_count().unwrap()),
            (1, 7)
        );
        let slots = |gpu: &nvml_wrapper::Device<'_>| -> Vec<u32> {
            (0..7).filter(|n| gpu.mig_device_by_index(*n).is_ok()).collect()
        };
        assert_eq!(slots(&gpu), [0, 1, 3, 4]);
        let slice = gpu.mig_device_by_index(1).unwrap();
        assert_eq!(slice.name().unwrap(), "NVIDIA A100-SXM4-40GB MIG 2g.10gb");
        assert_eq!(slice.attributes().unwrap().memory_size_mb, 9856);
        assert_eq!(slice.mig_parent_device().unwrap().index().unwrap(), 0);
        assert!(matches!(slice.minor_number(), Err(NvmlError::NotSupported)));
        assert!(matches!(gpu.utilization_rates(), Err(NvmlError::NotSupported)));

        let mut topology = Topology::named("a100x4-mig").unwrap();
        topology.gpus[0].mig.as_mut().unwrap().devices.truncate(1);
        driver.set_topology(&topology).unwrap();
        assert_eq!(slots(&gpu), [0]);
        assert!(slice.uuid().is_err(), "a handle of a device that is gone");
    });
}

#[test]
fn an_xid_wakes_its_own_set_at_once_and_79_loses_the_gpu() {
    in_child(
        "an_xid_wakes_its_own_set_at_once_and_79_loses_the_gpu",
        "h100x8",
        |driver, nvml| {
            driver.raise("2 31").unwrap(); // before the set was made: not told
            let set_of = |n: u32| {
                let set = nvml.create_event_set().unwrap();
                let gpu = nvml.device_by_index(n).unwrap();
                gpu.register_events(EventTypes::CRITICAL_XID_ERROR, set).unwrap()
            };
            let (two, three) = (set_of(2), set_of(3));
            assert!(matches!(two.wait(1), Err(NvmlError::Timeout)));
            let took = std::thread::scope(|scope| {
                let raised = scope.spawn(|| {
                    std::thread::sleep(Duration::from_millis(50));
                    let at = Instant::now();
                    driver.raise("2 79").unwrap();
                    at
                });
                let event = two.wait(5000).unwrap();
                assert_eq!(event.event_data, Some(XidError::Value(79)));
                let heard = Instant::now();
                heard - raised.join().unwrap()
            });
            assert!(took < Duration::from_secs(1), "{took:?}");
            assert!(
                matches!(three.wait(1), Err(NvmlError::Timeout)),
                "another GPU's set hears nothing"
            );
            assert!(matches!(two.wait(1), Err(NvmlError::GpuLost)));
            assert!(matches!(nvml.device_by_index(2), Err(NvmlError::GpuLost)));
            driver.raise("2 reset").unwrap();
            assert!(nvml.device_by_index(2).is_ok());
        },
    );
}

#[test]
fn calls_are_logged_and_can_be_made_to_fail_or_take_long() {
    in_child(
        "calls_are_logged_and_can_be_made_to_fail_or_take_long",
        "workstation",
        |driver, nvml| {
            driver.log_calls().unwrap();
            driver
                .override_with(&["nvmlDeviceGetName 15 1", "nvmlDeviceGetUUID sleep 60"])
                .unwrap();
            let (zero, one) = (nvml.device_by_index(0).unwrap(), nvml.device_by_index(1).unwrap());
            assert!(zero.name().is_ok());
            assert!(matches!(one.name(), Err(NvmlError::GpuLost)));
            let began = Instant::now();
            zero.uuid().unwrap();
            assert!(began.elapsed() >= Duration::from_millis(60));
            assert_eq!(
                driver.calls(),
                [
                    "nvmlDeviceGetHandleByIndex_v2 0",
                    "nvmlDeviceGetHandleByIndex_v2 1",
                    "nvmlDeviceGetName 0",
                    "nvmlDeviceGetName 1",
                    "nvmlDeviceGetUUID 0"
                ]
            );
            assert_eq!(
                zero.minor_number().unwrap(),
                1,
                "minor numbers need not follow the index"
            );
        },
    );
}

#[test]
fn the_soname_is_the_real_librarys() {
    let dir = tempfile::tempdir().unwrap();
    let driver = Driver::lay_out(dir.path(), &Topology::named("h200").unwrap()).unwrap();
    let bytes = std::fs::read(driver.library()).unwrap();
    let has = |text: &[u8]| bytes.windows(text.len()).any(|w| w == text);
    assert!(has(b"\0libnvidia-ml.so.1\0"));
}

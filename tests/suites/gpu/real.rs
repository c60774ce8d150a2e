//! A real GPU, where this machine has one: what slipway-agent finds is the driver's, and a container computes on it.

use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Output};

use anyhow::{Context, Result, ensure};
use harness::{World, lab};

use super::{image, with};

/// The NVIDIA driver's own word that it is loaded.
const LOADED: &str = "/proc/driver/nvidia/version";
/// Where a driver may be installed.
const ROOTS: [&str; 3] = ["/", "/run/nvidia/driver", "/usr/local/nvidia"];
/// What a driver's libraries want of the C library.
const LIBRARIES: [&str; 5] = [
    "libm.so.6",
    "libdl.so.2",
    "libpthread.so.0",
    "librt.so.1",
    "libgcc_s.so.1",
];

/// Fills memory of the one GPU it sees, and reads it back. The driver API's functions and types are those of cuda.h.
const COMPUTES: &str = r#"
#include <dlfcn.h>
#include <stdio.h>
#define CALL(name, ...) do { int (*f)() = (int (*)())dlsym(cuda, #name); \
  int e = f ? f(__VA_ARGS__) : -1; if (e) { printf("%s: %d\n", #name, e); return 1; } } while (0)
int main(void) {
  void *cuda = dlopen("libcuda.so.1", RTLD_NOW);
  if (!cuda) { puts(dlerror()); return 1; }
  int count = 0, device = -1; void *context = 0; unsigned long long memory = 0;
  static unsigned word[1 << 18]; unsigned char uuid[16];
  CALL(cuInit, 0);
  CALL(cuDeviceGetCount, &count);
  CALL(cuDeviceGet, &device, 0);
  CALL(cuDeviceGetUuid, uuid, device);
  CALL(cuDevicePrimaryCtxRetain, &context, device);
  CALL(cuCtxSetCurrent, context);
  CALL(cuMemAlloc_v2, &memory, sizeof word);
  CALL(cuMemsetD32_v2, memory, 0x51177a11u, sizeof word / 4);
  CALL(cuMemcpyDtoH_v2, word, memory, sizeof word);
  for (unsigned i = 0; i < sizeof word / 4; i++) if (word[i] != 0x51177a11u) { puts("wrong"); return 1; }
  CALL(cuMemFree_v2, memory);
  printf("%d ", count);
  for (int i = 0; i < 16; i++) printf("%s%02x", i == 4 || i == 6 || i == 8 || i == 10 ? "-" : "", uuid[i]);
  puts(" computed");
  return 0;
}
"#;

/// slipway-agent with the driver below `root`.
fn agent(w: &World, root: &str, args: &[&str]) -> Result<Output> {
    let config = format!(
        "[driver]\nroot = {root:?}\ndev = \"/dev\"\n[paths]\nstate = {:?}\n",
        w.lab.join("agent-state")
    );
    let config = w.lab.write("real-agent.toml", config)?;
    Command::new(lab::bin("slipway-agent"))
        .arg("--config")
        .arg(config)
        .args(args)
        .output()
        .context("starting slipway-agent (make build makes it)")
}

/// The devices of a CDI file that are whole GPUs by their UUIDs.
fn uuids(file: &Path) -> Result<Vec<String>> {
    let spec: serde_json::Value = serde_json::from_slice(&std::fs::read(file)?)?;
    let devices = spec["devices"].as_array().context("no devices")?;
    let names = devices.iter().filter_map(|d| d["name"].as_str());
    Ok(names
        .filter(|name| name.starts_with("GPU-"))
        .map(str::to_owned)
        .collect())
}

#[tokio::test]
async fn gpu_that_is_real_is_found_as_the_driver_has_it_and_a_container_computes_on_it() -> Result<()> {
    if !Path::new(LOADED).exists() {
        let _ = writeln!(
            std::io::stderr(),
            "\n*** SKIPPED: this test needs a real GPU; {LOADED} is not there ***\n"
        );
        return Ok(());
    }
    let w = World::with_cdi("gpu-real").await?;
    image(&w, &[("computes", COMPUTES)], &LIBRARIES)?;
    let folder = w.lab.join("cdi-dynamic");
    let mut said = Vec::new();
    for root in ROOTS {
        let output = folder.display().to_string();
        let out = agent(&w, root, &["cdi", "generate", "--output", &output])?;
        if out.status.success() {
            said.clear();
            break;
        }
        said.push(format!("{root}: {}", String::from_utf8_lossy(&out.stderr)));
    }
    ensure!(said.is_empty(), "no driver is found:\n{}", said.join("\n"));
    let file = std::fs::read_dir(&folder)?.next().context("no CDI file")??.path();
    let uuids = uuids(&file)?;
    ensure!(!uuids.is_empty(), "no GPU in {}", file.display());
    // A part of a machine may see fewer than its driver has.
    let mut all = String::new();
    for gpu in std::fs::read_dir("/proc/driver/nvidia/gpus")? {
        all += &std::fs::read_to_string(gpu?.path().join("information"))?;
    }
    for uuid in &uuids {
        ensure!(all.contains(uuid.as_str()), "{uuid} is not the driver's:\n{all}");
        let (code, lines) = w
            .shell(&uuid.to_lowercase(), |c| with(c, uuid), "computes")
            .await?;
        let own = uuid.trim_start_matches("GPU-");
        ensure!(code == 0 && lines == [format!("1 {own} computed")], "{lines:?}");
    }
    w.finish().await
}

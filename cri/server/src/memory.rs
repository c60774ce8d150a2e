//! How the C library's allocator is told to be thrifty: through the environment, before the first thread.
//!
//! glibc gives each thread an arena of its own and keeps what is freed in it; measured after 20 pods at once, that is
//! 7 MiB instead of 4. The settings are read when a program starts, so slipwayd starts itself once more (a millisecond).
//! Setting them in process would take unsafe code.

use std::os::unix::process::CommandExt;
use std::process::Command;

/// All of them, as mallopt(3) documents them. The thresholds also switch off glibc's own moving of them, which would let
/// a large buffer, once freed, stay in the heap for good.
const SETTINGS: [(&str, &str); 3] = [
    ("MALLOC_ARENA_MAX", "1"),
    ("MALLOC_TRIM_THRESHOLD_", "131072"),
    ("MALLOC_MMAP_THRESHOLD_", "131072"),
];

/// Starts this program again with the settings, unless somebody has made them. When that does not work it goes on
/// without: it is only memory.
pub fn settle() {
    if SETTINGS.iter().any(|(name, _)| std::env::var_os(name).is_some()) {
        return;
    }
    let mut arguments = std::env::args_os();
    let (Some(name), Ok(program)) = (arguments.next(), std::env::current_exe()) else {
        return;
    };
    let error = Command::new(program)
        .arg0(name)
        .args(arguments)
        .envs(SETTINGS)
        .exec();
    eprintln!("slipwayd: cannot start itself again to save memory: {error}");
}

//! Memory that was needed once and is not any more, given back to the kernel. Knows nothing of what it was used for.

/// Gives back all whole pages of the C library's heap that hold nothing, also those below something that lives on; whether
/// there were any. The library by itself gives back only the end of the heap (malloc_trim(3)). Always false with musl,
/// which gives back by itself.
pub fn trim_heap() -> bool {
    #[cfg(target_env = "gnu")]
    {
        // SAFETY: takes the allocator's own locks, and touches only what nobody has been given.
        unsafe { libc::malloc_trim(0) == 1 }
    }
    #[cfg(not(target_env = "gnu"))]
    false
}

/// How far below what is in use now [`trim_stack`] goes: within the 128 KiB that the kernel adds to a stack at exec
/// (setup_arg_pages in fs/exec.c). Below those nothing is for at least the kernel's gap of a megabyte.
const REACH: usize = 96 << 10;
/// Frames of ours, and of who is called, that are in use.
const IN_USE: usize = 4 << 10;

/// Gives back the pages of the first thread's stack that only calls which have returned have used. Does nothing in any
/// other thread, below whose stack there may be somebody's memory.
#[inline(never)]
pub fn trim_stack() {
    if rustix::thread::gettid() != rustix::process::getpid() {
        return;
    }
    let here = 0u8;
    let page = rustix::param::page_size();
    let end = (std::ptr::from_ref(&here).addr() - IN_USE) & !(page - 1);
    // SAFETY: all of it is below every frame that is in use and its red zone, in pages of this stack or in none
    // (`ENOMEM`): nobody's memory. Pages that are needed again come as zeroes, and nobody reads a stack before writing it.
    unsafe {
        libc::madvise(
            std::ptr::without_provenance_mut(end - REACH),
            REACH,
            libc::MADV_DONTNEED,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Kilobytes of anonymous memory, `RssAnon` of proc_pid_status(5).
    fn resident() -> u64 {
        let status = std::fs::read_to_string("/proc/self/status").expect("read");
        let line = status.lines().find_map(|l| l.strip_prefix("RssAnon:"));
        let number = line.and_then(|l| l.split_whitespace().next());
        number.and_then(|n| n.parse().ok()).expect("a number")
    }

    #[test]
    #[cfg(target_env = "gnu")]
    fn free_pages_below_something_that_lives_on_go_back() {
        let mut small: Vec<Vec<u8>> = (0..4096).map(|_| vec![1; 4096]).collect();
        let last = small.pop();
        let full = resident();
        drop(small);
        assert!(trim_heap());
        assert!(resident() + 8192 < full, "{} of {full} KiB", resident());
        drop(last);
    }

    #[test]
    fn another_threads_stack_is_left_alone() {
        let deep = [7u8; 32 << 10];
        trim_stack();
        assert!(std::hint::black_box(&deep).iter().all(|byte| *byte == 7));
    }
}

//! The built-in init itself: a few dozen machine instructions, and the ELF file around them.
//!
//! It waits for SIGCHLD and SIGTERM with both blocked (so that no handler, and no stack of one, is needed), reaps every
//! child that has ended, and exits on a SIGTERM whose sender is outside of its PID namespace (those have pid 0 in it). It makes four
//! different system calls, owns one page of code and one of stack, and knows nothing of anything.

#[cfg(target_arch = "x86_64")]
core::arch::global_asm!(
    ".pushsection .rodata.slipway_init, \"a\", @progbits",
    "slipway_init_begin:",
    "  mov edi, 2", // rt_sigprocmask(SIG_SETMASK, &set, NULL, 8)
    "  lea rsi, [rip + 6f]",
    "  xor edx, edx",
    "  mov r10d, 8",
    "  mov eax, 14",
    "  syscall",
    "  sub rsp, 128", // siginfo_t
    "2:",             // rt_sigtimedwait(&set, &info, NULL, 8)
    "  lea rdi, [rip + 6f]",
    "  mov rsi, rsp",
    "  xor edx, edx",
    "  mov r10d, 8",
    "  mov eax, 128",
    "  syscall",
    "  cmp eax, 15",
    "  jne 3f",
    "  cmp dword ptr [rsp + 16], 0", // si_pid
    "  jne 3f",
    "  xor edi, edi", // exit_group(0)
    "  mov eax, 231",
    "  syscall",
    "3:", // wait4(-1, NULL, WNOHANG | __WALL, NULL) until there is none
    "  mov rdi, -1",
    "  xor esi, esi",
    "  mov edx, 0x40000001",
    "  xor r10d, r10d",
    "  mov eax, 61",
    "  syscall",
    "  test eax, eax",
    "  jg 3b",
    "  jmp 2b",
    ".balign 8",
    "6: .quad 0x14000", // SIGTERM, SIGCHLD
    "slipway_init_end:",
    ".popsection",
);

#[cfg(target_arch = "aarch64")]
core::arch::global_asm!(
    ".pushsection .rodata.slipway_init, \"a\", @progbits",
    ".balign 8",
    "slipway_init_begin:",
    "  mov x0, #2",
    "  adr x1, 6f",
    "  mov x2, #0",
    "  mov x3, #8",
    "  mov x8, #135",
    "  svc #0",
    "  sub sp, sp, #128",
    "2:",
    "  adr x0, 6f",
    "  mov x1, sp",
    "  mov x2, #0",
    "  mov x3, #8",
    "  mov x8, #137",
    "  svc #0",
    "  cmp w0, #15",
    "  b.ne 3f",
    "  ldr w1, [sp, #16]",
    "  cbnz w1, 3f",
    "  mov x0, #0",
    "  mov x8, #94",
    "  svc #0",
    "3:",
    "  mov x0, #-1",
    "  mov x1, #0",
    "  mov w2, #1",
    "  movk w2, #0x4000, lsl #16",
    "  mov x3, #0",
    "  mov x8, #260",
    "  svc #0",
    "  cmp w0, #0",
    "  b.gt 3b",
    "  b 2b",
    ".balign 8",
    "6: .quad 0x14000",
    "slipway_init_end:",
    ".popsection",
);

unsafe extern "C" {
    #[link_name = "slipway_init_begin"]
    static BEGIN: u8;
    #[link_name = "slipway_init_end"]
    static END: u8;
}

#[cfg(target_arch = "x86_64")]
const MACHINE: u16 = 62;
#[cfg(target_arch = "aarch64")]
const MACHINE: u16 = 183;

const BASE: u64 = 0x40_0000;
const HEADER: u64 = 64;
const PROGRAM_HEADER: u64 = 56;

/// The ELF file: one segment, readable and executable, and a stack that is not executable.
pub(super) fn elf() -> Vec<u8> {
    let (begin, end) = (&raw const BEGIN, &raw const END);
    // SAFETY: both symbols are in the same section, the end behind the beginning; what lies between is constant.
    let code = unsafe { std::slice::from_raw_parts(begin, end.offset_from_unsigned(begin)) };
    let start = HEADER + 2 * PROGRAM_HEADER;
    let size = start + code.len() as u64;
    let mut out = Vec::with_capacity(size as usize);
    out.extend(*b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    out.extend(2u16.to_le_bytes()); // ET_EXEC
    out.extend(MACHINE.to_le_bytes());
    out.extend(1u32.to_le_bytes());
    for word in [BASE + start, HEADER, 0] {
        out.extend(word.to_le_bytes()); // entry, program headers, section headers
    }
    out.extend(0u32.to_le_bytes());
    for half in [HEADER as u16, PROGRAM_HEADER as u16, 2, 0, 0, 0] {
        out.extend(half.to_le_bytes());
    }
    let mut segment = |kind: u32, flags: u32, rest: [u64; 6]| {
        out.extend(kind.to_le_bytes());
        out.extend(flags.to_le_bytes());
        rest.iter().for_each(|word| out.extend(word.to_le_bytes()));
    };
    segment(1, 5, [0, BASE, BASE, size, size, 4096]); // PT_LOAD, R + X
    segment(0x6474_e551, 6, [0, 0, 0, 0, 0, 16]); // PT_GNU_STACK, R + W
    out.extend(code);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_whole_program_fits_in_a_twelfth_of_a_page() {
        let elf = elf();
        assert!(elf.len() < 340, "{}", elf.len());
        assert_eq!(&elf[..4], b"\x7fELF");
    }
}

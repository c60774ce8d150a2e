//! Seccomp filters as compiled programs: their file format and loading. Compiling them from OCI JSON is the worker's.
//!
//! `seccomp.bpf` in a bundle is the flags for `seccomp(2)` (u32, little endian), then the program: `struct sock_filter`s of
//! eight bytes (native order), as libseccomp exports them.

use crate::error::{failed, invalid};
use crate::fork::{Sys, cvt};
use std::io;

/// `struct sock_filter`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Instruction {
    code: u16,
    jt: u8,
    jf: u8,
    k: u32,
}

/// The kernel's bound on instructions (BPF_MAXINSNS).
const MAX_INSTRUCTIONS: usize = 4096;

/// A filter ready to be loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Filter {
    flags: u32,
    program: Vec<Instruction>,
}

impl Filter {
    /// From the program's bytes.
    ///
    /// # Errors
    /// `InvalidInput` when the length is no multiple of eight, zero, or more than 4096 instructions.
    pub fn new(program: &[u8], flags: u32) -> io::Result<Filter> {
        let count = program.len() / 8;
        if !program.len().is_multiple_of(8) || count == 0 || count > MAX_INSTRUCTIONS {
            return Err(invalid(format!("{} bytes are no seccomp program", program.len())));
        }
        let program = program
            .chunks_exact(8)
            .map(|c| Instruction {
                code: u16::from_ne_bytes([c[0], c[1]]),
                jt: c[2],
                jf: c[3],
                k: u32::from_ne_bytes([c[4], c[5], c[6], c[7]]),
            })
            .collect();
        Ok(Filter { flags, program })
    }

    /// From instructions of our own.
    pub(crate) fn of(program: &[(u16, u8, u8, u32)]) -> Filter {
        let program = program
            .iter()
            .map(|&(code, jt, jf, k)| Instruction { code, jt, jf, k })
            .collect();
        Filter { flags: 0, program }
    }

    /// From the bytes of a `seccomp.bpf`.
    ///
    /// # Errors
    /// `InvalidInput` when they have another shape.
    pub fn from_bytes(file: &[u8]) -> io::Result<Filter> {
        let Some((flags, program)) = file.split_first_chunk::<4>() else {
            return Err(invalid("a seccomp file of less than four bytes"));
        };
        Filter::new(program, u32::from_le_bytes(*flags))
    }

    /// The bytes of a `seccomp.bpf`.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = self.flags.to_le_bytes().to_vec();
        for i in &self.program {
            out.extend(i.code.to_ne_bytes());
            out.extend([i.jt, i.jf]);
            out.extend(i.k.to_ne_bytes());
        }
        out
    }

    /// Loads it for this thread, for good. Async-signal-safe.
    pub(crate) fn install(&self) -> Sys<()> {
        let program = libc::sock_fprog {
            len: self.program.len() as u16, // at most MAX_INSTRUCTIONS
            filter: self.program.as_ptr().cast_mut().cast(),
        };
        // SAFETY: the program is live and its length right; the kernel only reads it.
        cvt(unsafe {
            libc::syscall(
                libc::SYS_seccomp,
                libc::SECCOMP_SET_MODE_FILTER,
                self.flags,
                std::ptr::from_ref(&program),
            )
        })
        .map(drop)
    }
}

/// Loads a program for the calling thread, for good; needs no_new_privs or CAP_SYS_ADMIN.
///
/// # Errors
/// `InvalidInput` for a malformed program; else what `seccomp(2)` says.
pub fn load(bpf: &[u8], flags: u32) -> io::Result<()> {
    Filter::new(bpf, flags)?
        .install()
        .map_err(failed(|| "load a seccomp filter".to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_is_the_same_after_its_file() {
        let f = Filter::new(&[6, 0, 0, 0, 0, 0, 255, 127], 4).unwrap();
        assert_eq!(Filter::from_bytes(&f.to_bytes()).unwrap(), f);
        assert!(Filter::from_bytes(&[0, 0]).is_err());
        assert!(Filter::new(&[], 0).is_err());
        assert!(Filter::new(&[0; 12], 0).is_err());
    }
}

//! Loading and attaching device programs (`bpf(2)`, BPF_PROG_TYPE_CGROUP_DEVICE). What they decide is `device`'s.

use super::device::Insn;
use crate::fork::cvt;
use rustix::fs::{CWD, Mode, OFlags};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;

const PROG_LOAD: libc::c_long = 5;
const PROG_ATTACH: libc::c_long = 8;
const PROG_DETACH: libc::c_long = 9;
const PROG_GET_FD_BY_ID: libc::c_long = 13;
const OBJ_GET_INFO_BY_FD: libc::c_long = 15;
const PROG_QUERY: libc::c_long = 16;
const TYPE_CGROUP_DEVICE: u32 = 15;
const ATTACH_CGROUP_DEVICE: u32 = 6;
const ALLOW_MULTI: u32 = 2;
/// By this name we know our own programs among those systemd or others attached.
const NAME: [u8; 16] = *b"slipway_devices\0";

#[repr(C)]
#[derive(Default)]
struct Load {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
    name: [u8; 16],
    ifindex: u32,
    expected_attach_type: u32,
}

#[repr(C)]
#[derive(Default)]
struct Attach {
    target: u32,
    program: u32,
    attach_type: u32,
    flags: u32,
    replace: u32,
}

#[repr(C)]
#[derive(Default)]
struct Query {
    target: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    ids: u64,
    count: u32,
    pad: u32,
}

#[repr(C)]
#[derive(Default)]
struct ById {
    id: u32,
    next: u32,
    flags: u32,
}

#[repr(C)]
#[derive(Default)]
struct Info {
    fd: u32,
    len: u32,
    info: u64,
}

/// One bpf(2) call on a struct that is a prefix of `union bpf_attr`.
fn bpf<T>(command: libc::c_long, attr: &mut T) -> io::Result<libc::c_long> {
    // SAFETY: attr is live and its size right; the addresses inside point to live memory of the caller.
    Ok(cvt(unsafe {
        libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<T>())
    })?)
}

fn raw(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd().cast_unsigned()
}

fn owned(fd: libc::c_long) -> OwnedFd {
    // SAFETY: the kernel just opened it for us.
    unsafe { OwnedFd::from_raw_fd(fd as i32) }
}

fn load(program: &[Insn]) -> io::Result<OwnedFd> {
    let code: Vec<u8> = program
        .iter()
        .flat_map(|i| {
            let (off, imm) = (i.off.to_ne_bytes(), i.imm.to_ne_bytes());
            [i.code, i.regs, off[0], off[1], imm[0], imm[1], imm[2], imm[3]]
        })
        .collect();
    let mut attr = Load {
        prog_type: TYPE_CGROUP_DEVICE,
        insn_cnt: u32::try_from(program.len()).unwrap_or(u32::MAX),
        insns: code.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        name: NAME,
        expected_attach_type: ATTACH_CGROUP_DEVICE,
        ..Load::default()
    };
    bpf(PROG_LOAD, &mut attr).map(owned)
}

/// Puts a device program on a v2 cgroup, and takes off the one we put there before. In between both decide, so that
/// never more is allowed than by one of them.
pub(super) fn attach(dir: &Path, program: &[Insn]) -> io::Result<()> {
    let cgroup = rustix::fs::openat(
        CWD,
        dir,
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    let before = ours(cgroup.as_fd());
    let program = load(program)?;
    let mut attr = Attach {
        target: raw(cgroup.as_fd()),
        program: raw(program.as_fd()),
        attach_type: ATTACH_CGROUP_DEVICE,
        flags: ALLOW_MULTI,
        ..Attach::default()
    };
    bpf(PROG_ATTACH, &mut attr)?;
    for old in before {
        attr.program = raw(old.as_fd());
        attr.flags = 0;
        bpf(PROG_DETACH, &mut attr)?;
    }
    Ok(())
}

/// Programs of ours on this cgroup.
fn ours(cgroup: BorrowedFd<'_>) -> Vec<OwnedFd> {
    let mut ids = [0u32; 64];
    let mut query = Query {
        target: raw(cgroup),
        attach_type: ATTACH_CGROUP_DEVICE,
        ids: ids.as_mut_ptr() as u64,
        count: 64,
        ..Query::default()
    };
    if bpf(PROG_QUERY, &mut query).is_err() {
        return Vec::new();
    }
    let count = usize::try_from(query.count).unwrap_or(0).min(ids.len());
    let open = |id: &u32| {
        bpf(
            PROG_GET_FD_BY_ID,
            &mut ById {
                id: *id,
                ..ById::default()
            },
        )
        .ok()
        .map(owned)
    };
    ids[..count]
        .iter()
        .filter_map(open)
        .filter(|fd| name_of(fd.as_fd()) == Some(NAME))
        .collect()
}

/// `struct bpf_prog_info.name`, at byte 64.
fn name_of(program: BorrowedFd<'_>) -> Option<[u8; 16]> {
    let mut info = [0u8; 80];
    let mut attr = Info {
        fd: raw(program),
        len: 80,
        info: info.as_mut_ptr() as u64,
    };
    bpf(OBJ_GET_INFO_BY_FD, &mut attr).ok()?;
    info[64..80].try_into().ok()
}

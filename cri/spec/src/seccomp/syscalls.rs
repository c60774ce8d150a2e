//! System calls that every container may make whatever its arguments, by topic. Names that a kernel
//! or an architecture does not have are passed over when the filter is compiled.

/// Space-separated names.
///
/// Deliberately absent: io_uring (a second system call interface that filters do not see),
/// socketcall (its arguments are behind a pointer, so that it would open the refused address
/// families to 32-bit programs), userfaultfd, keyctl and its kin, kexec, swap, modules, mounts,
/// namespaces; and what [`super::runtime_default`] gives by capability or by argument.
pub(super) const ALLOWED: [&str; 14] = [
    // sockets
    "accept accept4 bind connect getpeername getsockname getsockopt listen recv recvfrom recvmmsg \
     recvmmsg_time64 recvmsg send sendmmsg sendmsg sendto setsockopt shutdown socketpair",
    // extended attributes
    "fgetxattr flistxattr fremovexattr fsetxattr getxattr getxattrat lgetxattr listxattr listxattrat \
     llistxattr lremovexattr lsetxattr removexattr removexattrat setxattr setxattrat",
    // users, groups and capabilities
    "capget capset getegid getegid32 geteuid geteuid32 getgid getgid32 getgroups getgroups32 \
     getresgid getresgid32 getresuid getresuid32 getuid getuid32 setfsgid setfsgid32 setfsuid \
     setfsuid32 setgid setgid32 setgroups setgroups32 setregid setregid32 setresgid setresgid32 \
     setresuid setresuid32 setreuid setreuid32 setuid setuid32 umask",
    // signals
    "kill pause pidfd_send_signal restart_syscall rt_sigaction rt_sigpending rt_sigprocmask \
     rt_sigqueueinfo rt_sigreturn rt_sigsuspend rt_sigtimedwait rt_sigtimedwait_time64 \
     rt_tgsigqueueinfo sigaltstack signalfd signalfd4 sigprocmask sigreturn tgkill tkill",
    // clocks and timers
    "adjtimex alarm clock_adjtime clock_adjtime64 clock_getres clock_getres_time64 clock_gettime \
     clock_gettime64 clock_nanosleep clock_nanosleep_time64 futimesat getitimer gettimeofday \
     nanosleep setitimer time timer_create timer_delete timer_getoverrun timer_gettime \
     timer_gettime64 timer_settime timer_settime64 timerfd_create timerfd_gettime timerfd_gettime64 \
     timerfd_settime timerfd_settime64 times utime utimensat utimensat_time64 utimes",
    // waiting for descriptors
    "_newselect epoll_create epoll_create1 epoll_ctl epoll_ctl_old epoll_pwait epoll_pwait2 \
     epoll_wait epoll_wait_old eventfd eventfd2 fanotify_mark inotify_add_watch inotify_init \
     inotify_init1 inotify_rm_watch io_cancel io_destroy io_getevents io_pgetevents \
     io_pgetevents_time64 io_setup io_submit poll ppoll ppoll_time64 pselect6 pselect6_time64 select",
    // memory
    "brk madvise map_shadow_stack membarrier memfd_create memfd_secret mincore mlock mlock2 mlockall \
     mmap mmap2 mprotect mremap mseal msync munlock munlockall munmap pkey_alloc pkey_free \
     pkey_mprotect process_mrelease remap_file_pages",
    // System V and POSIX inter-process communication
    "ipc mq_getsetattr mq_notify mq_open mq_timedreceive mq_timedreceive_time64 mq_timedsend \
     mq_timedsend_time64 mq_unlink msgctl msgget msgrcv msgsnd semctl semget semop semtimedop \
     semtimedop_time64 shmat shmctl shmdt shmget",
    // futexes and threads
    "futex futex_requeue futex_time64 futex_wait futex_waitv futex_wake get_robust_list \
     get_thread_area getcpu gettid rseq set_robust_list set_thread_area set_tid_address",
    // processes
    "execve execveat exit exit_group fork getpgid getpgrp getpid getppid getpriority getrlimit \
     getrusage getsid ioprio_get ioprio_set pidfd_open prctl prlimit64 setpgid setpriority setrlimit \
     setsid ugetrlimit uretprobe vfork wait4 waitid waitpid",
    // scheduling
    "sched_get_priority_max sched_get_priority_min sched_getaffinity sched_getattr sched_getparam \
     sched_getscheduler sched_rr_get_interval sched_rr_get_interval_time64 sched_setaffinity \
     sched_setattr sched_setparam sched_setscheduler sched_yield",
    // sandboxing oneself
    "landlock_add_rule landlock_create_ruleset landlock_restrict_self lsm_get_self_attr \
     lsm_list_modules lsm_set_self_attr seccomp",
    // the system
    "getrandom sync syncfs sysinfo uname",
    // files, directories and mounts looked at
    "_llseek access cachestat chdir chmod chown chown32 close close_range copy_file_range creat dup \
     dup2 dup3 faccessat faccessat2 fadvise64 fadvise64_64 fallocate fchdir fchmod fchmodat fchmodat2 \
     fchown fchown32 fchownat fcntl fcntl64 fdatasync flock fstat fstat64 fstatat64 fstatfs fstatfs64 \
     fsync ftruncate ftruncate64 getcwd getdents getdents64 ioctl lchown lchown32 link linkat \
     listmount lseek lstat lstat64 mkdir mkdirat mknod mknodat name_to_handle_at newfstatat open \
     openat openat2 pipe pipe2 pread64 preadv preadv2 pwrite64 pwritev pwritev2 read readahead \
     readlink readlinkat readv rename renameat renameat2 rmdir sendfile sendfile64 splice stat stat64 \
     statfs statfs64 statmount statx symlink symlinkat sync_file_range tee truncate truncate64 unlink \
     unlinkat vmsplice write writev",
];

/// More on one architecture.
pub(super) const X86: &str = "arch_prctl modify_ldt";

/// More on one architecture.
pub(super) const ARM: &str =
    "arm_fadvise64_64 arm_sync_file_range breakpoint cacheflush set_tls sync_file_range2";

/// More with a capability.
pub(super) const BY_CAPABILITY: [(&str, &str); 15] = [
    (
        "CAP_SYS_ADMIN",
        "bpf clone clone3 fanotify_init fsconfig fsmount fsopen fspick lookup_dcookie mount mount_setattr \
         move_mount open_tree perf_event_open quotactl quotactl_fd setdomainname sethostname setns syslog \
         umount umount2 unshare",
    ),
    ("CAP_BPF", "bpf"),
    ("CAP_DAC_READ_SEARCH", "open_by_handle_at"),
    ("CAP_PERFMON", "perf_event_open"),
    ("CAP_SYSLOG", "syslog"),
    ("CAP_SYS_BOOT", "reboot"),
    ("CAP_SYS_CHROOT", "chroot"),
    ("CAP_SYS_MODULE", "delete_module finit_module init_module"),
    (
        "CAP_SYS_NICE",
        "get_mempolicy mbind set_mempolicy set_mempolicy_home_node",
    ),
    ("CAP_SYS_PACCT", "acct"),
    (
        "CAP_SYS_PTRACE",
        "kcmp pidfd_getfd process_madvise process_vm_readv process_vm_writev ptrace",
    ),
    ("CAP_SYS_RAWIO", "ioperm iopl"),
    ("CAP_SYS_TIME", "clock_settime clock_settime64 settimeofday stime"),
    ("CAP_SYS_TTY_CONFIG", "vhangup"),
    // Debuggers in a container work since 4.8, where a traced process no longer escapes its filter.
    ("", "process_vm_readv process_vm_writev ptrace"),
];

"""Confines the calling process irrevocably and without privileges (Linux).

In this order: a root of its own, where the kernel allows that (`namespace.py`); resource limits; capabilities
(all dropped); files (Landlock: the standard library is readable, one folder writable, nothing else can be
opened); system calls (seccomp: those that Python needs to compute
are allowed, all others refused, so there are no sockets, no child processes, no signals to other processes,
no changes of owner or mode).
"""

from __future__ import annotations

import ctypes
import os
import resource
import sysconfig
from pathlib import Path

from stillhouse.sandbox import namespace

_LIBC = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 1, 4, 38
_SIGKILL = 9

# The same numbers on every architecture (Linux 5.13).
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR, _REMOVE_FILE, _MAKE_REG = 1, 2, 4, 8, 32, 256
_TRUNCATE = 1 << 14
_READ = _EXECUTE | _READ_FILE | _READ_DIR
_WRITE = _READ_FILE | _READ_DIR | _WRITE_FILE | _REMOVE_FILE | _MAKE_REG | _TRUNCATE

_ALLOWED = """
read write readv writev pread64 pwrite64 lseek _llseek open openat openat2 creat close close_range
fstat fstat64 stat stat64 lstat lstat64 newfstatat fstatat64 statx access faccessat faccessat2
readlink readlinkat getdents getdents64 getcwd chdir fchdir dup dup2 dup3
ftruncate ftruncate64 fsync fdatasync fadvise64 unlink unlinkat rename renameat renameat2 umask
statfs fstatfs statfs64 fstatfs64 flock pipe pipe2 poll ppoll ppoll_time64 select _newselect pselect6
pselect6_time64 epoll_create epoll_create1 epoll_ctl epoll_wait epoll_pwait eventfd eventfd2
munmap mprotect mremap madvise brk msync membarrier mincore
futex futex_time64 futex_waitv set_robust_list get_robust_list rseq set_tid_address arch_prctl
getpid getppid gettid getuid geteuid getgid getegid getuid32 geteuid32 getgid32 getegid32
getpgrp getpgid getsid getgroups getresuid getresgid capget
sched_yield sched_getaffinity sched_getparam sched_getscheduler getcpu
nanosleep clock_nanosleep clock_nanosleep_time64 clock_gettime clock_gettime64 clock_getres
clock_getres_time64 gettimeofday time times getrusage getitimer setitimer alarm
sysinfo uname getrandom getrlimit ugetrlimit
rt_sigaction rt_sigprocmask rt_sigreturn rt_sigpending rt_sigtimedwait rt_sigsuspend sigaltstack
sigreturn pause exit exit_group restart_syscall
"""

# Only these requests: others send signals. F_SETOWN and F_SETSIG choose a process and the signal that it
# gets, such as SIGKILL for the parent.
_FCNTL = (0, 1, 2, 3, 4, 5, 6, 7, 1030)  # F_DUPFD to F_SETFL, locks, F_DUPFD_CLOEXEC
_IOCTL = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)  # TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIO(N)CLEX
_REQUESTS = {"fcntl": _FCNTL, "fcntl64": _FCNTL, "ioctl": _IOCTL}


# Memory of a file that is shared with it stays when the file is deleted, where no limit on files counts it.
_PRIVATE_MEMORY, _ANONYMOUS_MEMORY = (0x0F, 0x02), (0x2F, 0x21)  # flags of mmap: mask, and what must be set
OPEN_FILES = 16
"""A deleted file that is still open counts in no folder: this times the size of a file bounds them."""


class ConfinementError(OSError):
    """The process could not be confined; the message says which step failed."""


def confine(
    folder: str, *, parent: int, memory: int, cpu_seconds: int, file_size: int, threads: int, own_root: bool
) -> None:
    """Confine the calling process.

    Args:
        folder: the only folder where it may write.
        parent: pid of the parent; the process is killed when the parent dies.
        memory: bytes of address space.
        cpu_seconds: CPU time; one second later the kernel kills the process.
        file_size: bytes of one file.
        threads: most threads, where the kernel counts them for this process alone; elsewhere whoever started
            it has to count.
        own_root: whether the kernel lets it have a root of its own (`namespace.py`).

    Raises:
        ConfinementError: a step failed. The process must end then.
    """
    _call("prctl", _PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before prctl
        raise ConfinementError("the parent has died")
    if own_root:
        namespace.enter(folder, readable_paths())
    _call("prctl", _PR_SET_DUMPABLE, 0, 0, 0, 0)
    _call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    for name, soft, hard in (
        (resource.RLIMIT_CPU, cpu_seconds, cpu_seconds + 1),
        (resource.RLIMIT_AS, memory, memory),
        (resource.RLIMIT_FSIZE, file_size, file_size),
        (resource.RLIMIT_NOFILE, OPEN_FILES, OPEN_FILES),
        (resource.RLIMIT_CORE, 0, 0),
        *([(resource.RLIMIT_NPROC, threads, threads)] if own_root and _counts_by_namespace() else []),
    ):
        ceiling = resource.getrlimit(name)[1]
        if ceiling != resource.RLIM_INFINITY:
            soft, hard = min(soft, ceiling), min(hard, ceiling)
        resource.setrlimit(name, (soft, hard))
    _drop_capabilities()
    _restrict_files(folder)
    _restrict_system_calls()


def readable_paths() -> dict[str, int]:
    """What may be read, and how: the standard library, the C library and two devices."""
    paths = {sysconfig.get_path(name): _READ for name in ("stdlib", "platstdlib")}
    paths |= dict.fromkeys(("/lib", "/lib64", "/usr/lib"), _READ)
    return paths | {"/dev/urandom": _READ_FILE, "/dev/null": _READ_FILE | _WRITE_FILE}


def _counts_by_namespace() -> bool:
    """Whether RLIMIT_NPROC counts a user's tasks in each user namespace for itself (Linux 5.14)."""
    major, minor = os.uname().release.split(".")[:2]
    return (int(major), int(minor)) >= (5, 14)


def _call(function: str, *arguments: int) -> int:
    result: int = getattr(_LIBC, function)(*map(ctypes.c_ulong, arguments))
    if result < 0:
        raise ConfinementError(ctypes.get_errno(), f"{function}: {os.strerror(ctypes.get_errno())}")
    return result


def _drop_capabilities() -> None:
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    nothing = (ctypes.c_uint32 * 6)()
    if _LIBC.capset(header, nothing) < 0:
        raise ConfinementError(ctypes.get_errno(), "capset: cannot drop capabilities")


class _Ruleset(ctypes.Structure):
    _fields_ = (("files", ctypes.c_uint64),)


class _Beneath(ctypes.Structure):
    _pack_ = 1
    _layout_ = "ms"
    _fields_ = (("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32))


def landlock_version() -> int:
    """The kernel's Landlock ABI version; 0 without Landlock."""
    return max(0, int(_LIBC.syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint32(1))))


def libseccomp() -> ctypes.CDLL | None:
    """The library that compiles a seccomp filter; None where it is not installed."""
    try:
        return ctypes.CDLL("libseccomp.so.2", use_errno=True)
    except OSError:
        return None


def _restrict_files(folder: str) -> None:
    version = landlock_version()
    if not version:
        raise ConfinementError("the kernel has no Landlock")
    handled = (1 << 13) - 1  # version 1
    if version >= 2:
        handled |= 1 << 13  # moving files between folders
    if version >= 3:
        handled |= _TRUNCATE
    rules = _Ruleset(handled)
    ruleset = _LIBC.syscall(_LANDLOCK_CREATE, ctypes.byref(rules), ctypes.c_size_t(8), ctypes.c_uint32(0))
    if ruleset < 0:
        raise ConfinementError(ctypes.get_errno(), "Landlock refuses a set of rules")
    for path, allowed in (readable_paths() | {folder: _WRITE}).items():
        if Path(path).exists():
            _allow_beneath(ruleset, path, allowed & handled)
    if _LIBC.syscall(_LANDLOCK_RESTRICT, ctypes.c_int(ruleset), ctypes.c_uint32(0)) < 0:
        raise ConfinementError(ctypes.get_errno(), "Landlock does not restrict this process")
    os.close(ruleset)


def _allow_beneath(ruleset: int, path: str, allowed: int) -> None:
    parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
    rule = _Beneath(allowed, parent)
    done = _LIBC.syscall(
        _LANDLOCK_ADD, ctypes.c_int(ruleset), ctypes.c_int(1), ctypes.byref(rule), ctypes.c_uint32(0)
    )
    os.close(parent)
    if done < 0:
        raise ConfinementError(ctypes.get_errno(), f"Landlock refuses a rule for {path}")


class _Compare(ctypes.Structure):
    _fields_ = (
        ("argument", ctypes.c_uint),
        ("operator", ctypes.c_int),
        ("a", ctypes.c_uint64),
        ("b", ctypes.c_uint64),
    )


_ALLOW = 0x7FFF0000
_REFUSE = 0x00050000 | 1  # EPERM
_UNKNOWN = 0x00050000 | 38  # ENOSYS: the C library then tries clone
_EQUAL, _MASKED = 4, 7
_CLONE_THREAD = 0x10000


def _restrict_system_calls() -> None:
    library = libseccomp()
    if library is None:
        raise ConfinementError("libseccomp is not installed")
    library.seccomp_init.restype = ctypes.c_void_p
    rules = ctypes.c_void_p(library.seccomp_init(ctypes.c_uint32(_REFUSE)))

    def add(name: str, action: int, *compare: _Compare) -> None:
        number = library.seccomp_syscall_resolve_name(name.encode())
        conditions = (_Compare * len(compare))(*compare)
        library.seccomp_rule_add_array(
            rules, ctypes.c_uint32(action), ctypes.c_int(number), ctypes.c_uint(len(compare)), conditions
        )

    for name in _ALLOWED.split():
        add(name, _ALLOW)
    for name, requests in _REQUESTS.items():
        for request in requests:
            add(name, _ALLOW, _Compare(1, _EQUAL, request, 0))
    for mask, wanted in (_PRIVATE_MEMORY, _ANONYMOUS_MEMORY):
        for name in ("mmap", "mmap2"):
            add(name, _ALLOW, _Compare(3, _MASKED, mask, wanted))
    add("clone", _ALLOW, _Compare(0, _MASKED, _CLONE_THREAD, _CLONE_THREAD))
    add("clone3", _UNKNOWN)
    add("prlimit64", _ALLOW, _Compare(0, _EQUAL, 0, 0))
    loaded = library.seccomp_load(rules)
    library.seccomp_release(rules)
    if loaded != 0:
        raise ConfinementError(-loaded, f"seccomp: {os.strerror(-loaded)}")

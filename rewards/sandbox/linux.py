"""System calls that Python 3.11 has no function for, by ctypes; each raises OSError with its name.

Left out: what to do with them (jail.py, zygote.py), and every architecture but x86_64 and aarch64.
"""

import ctypes
import os
import platform

CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

MS_NOSUID, MS_NODEV, MS_NOEXEC = 2, 4, 8
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
MNT_DETACH = 2
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV = 1, 2, 4
AT_FDCWD, AT_RECURSIVE = -100, 0x8000

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 4, 24, 38
LAST_CAPABILITY = 40
SECCOMP_SET_MODE_FILTER = 1

MACHINE = platform.machine()
# name -> (x86_64, aarch64); those without a wrapper in libc
_NUMBERS = {"pivot_root": (155, 41), "seccomp": (317, 277), "mount_setattr": (442, 442)}
_libc = ctypes.CDLL(None, use_errno=True)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_char_p))


def _check(result: int, what: str) -> None:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")


def _syscall(name: str, *arguments: object) -> None:
    number = _NUMBERS[name][("x86_64", "aarch64").index(MACHINE)]
    _check(_libc.syscall(ctypes.c_long(number), *arguments), name)


def unshare(flags: int) -> None:
    _check(_libc.unshare(flags), "unshare")


def setns(fd: int, kind: int) -> None:
    _check(_libc.setns(fd, kind), "setns")


def mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    encoded = [None if text is None else os.fsencode(text) for text in (source, target, kind, options)]
    flags_ = ctypes.c_ulong(flags)
    _check(_libc.mount(*encoded[:3], flags_, encoded[3]), f"mount {kind or 'bind'} at {target}")


def unmount(target: str) -> None:
    """Take it out of this mount namespace at once, busy or not."""
    _check(_libc.umount2(os.fsencode(target), MNT_DETACH), f"unmount {target}")


def pivot_root(new: str, old: str) -> None:
    _syscall("pivot_root", os.fsencode(new), os.fsencode(old))


def restrict_mounts(target: str, attributes: int) -> None:
    """Add attributes (`MOUNT_ATTR_…`) to a mount and everything below it. Linux 5.12."""
    pack = (ctypes.c_uint64 * 4)(attributes, 0, 0, 0)
    size = ctypes.c_size_t(ctypes.sizeof(pack))
    _syscall("mount_setattr", AT_FDCWD, os.fsencode(target), AT_RECURSIVE, ctypes.byref(pack), size)


def prctl(option: int, value: int) -> None:
    zero = ctypes.c_ulong(0)
    _check(_libc.prctl(option, ctypes.c_ulong(value), zero, zero, zero), f"prctl {option}")


def drop_bounding_set() -> None:
    """No later exec, set-user-ID or not, can gain a capability."""
    for capability in range(LAST_CAPABILITY + 1):
        prctl(PR_CAPBSET_DROP, capability)


def drop_capabilities() -> None:
    """Empty this process's effective, permitted and inheritable sets."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this process
    _check(_libc.capset(header, (ctypes.c_uint32 * 6)()), "capset")


def install_filter(program: bytes) -> None:
    """Put a seccomp filter (BPF, 8 bytes an instruction) on this process and all that it starts, for good."""
    described = _Program(len(program) // 8, program)
    _syscall("seccomp", ctypes.c_ulong(SECCOMP_SET_MODE_FILTER), ctypes.c_ulong(0), ctypes.byref(described))

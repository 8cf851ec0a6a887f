"""Architecture -> the seccomp filter of a candidate: which system calls answer with an error instead of being made.

A list of what is refused, as isolate and docker keep one, since a Python program may use any ordinary call.
Everything newer than the list is refused too, and another architecture's calls (i386, x32) end the process.
Numbers are the kernel's, from its syscall tables.
"""

import errno
import struct

# name -> (x86_64, aarch64); None where the architecture has no such call
DENIED: dict[str, tuple[int | None, int | None]] = {
    # other processes
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "pidfd_getfd": (438, 438), "process_madvise": (440, 440), "process_mrelease": (448, 448),
    "move_pages": (279, 239), "migrate_pages": (256, 238),
    # namespaces and mounts
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41),
    "chroot": (161, 51), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "quotactl": (179, 60), "quotactl_fd": (443, 443),
    # large kernel surfaces
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "fanotify_init": (300, 262),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    "modify_ldt": (154, None), "personality": (135, 92), "uselib": (134, None), "lookup_dcookie": (212, 18),
    # the machine
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "create_module": (174, None), "init_module": (175, 105),
    "finit_module": (313, 273), "delete_module": (176, 106), "reboot": (169, 142), "swapon": (167, 224),
    "swapoff": (168, 225), "acct": (163, 89), "syslog": (103, 116), "iopl": (172, None), "ioperm": (173, None),
    "sethostname": (170, 161), "setdomainname": (171, 162), "vhangup": (153, 58), "settimeofday": (164, 170),
    "clock_settime": (227, 112), "adjtimex": (159, 171), "clock_adjtime": (305, 266),
    # memory or a message that would outlive the process or escape its limits
    "shmget": (29, 194), "shmat": (30, 196), "shmctl": (31, 195), "semget": (64, 190), "semop": (65, 193),
    "semctl": (66, 191), "semtimedop": (220, 192), "msgget": (68, 186), "msgsnd": (69, 189), "msgrcv": (70, 188),
    "msgctl": (71, 187), "mq_open": (240, 180), "mq_unlink": (241, 181), "memfd_create": (319, 279),
    "memfd_secret": (447, 447), "flock": (73, 32),
}  # fmt: skip
NAMESPACE_FLAGS = 0x7E020080
TIOCSTI, TIOCSETD, TIOCLINUX = 0x5412, 0x5423, 0x541C
F_SETLK, F_SETLKW, F_OFD_SETLK, F_OFD_SETLKW, F_SETLEASE = 6, 7, 37, 38, 1024
AF_UNIX = 1
LAST_KNOWN = 462  # mseal, Linux 6.10
X32_BIT = 0x40000000

# name -> (number on x86_64, on aarch64, argument, values): refused if the argument is one of the values
DENIED_ARGUMENT = {
    "ioctl": (16, 29, 1, (TIOCSTI, TIOCSETD, TIOCLINUX)),
    "fcntl": (72, 25, 1, (F_SETLK, F_SETLKW, F_OFD_SETLK, F_OFD_SETLKW, F_SETLEASE)),
}
CLONE, CLONE3, SOCKET, SOCKETPAIR = (56, 220), (435, 435), (41, 198), (53, 199)
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

_LOAD, _EQUAL, _GREATER, _ANY_BIT, _RETURN = 0x20, 0x15, 0x25, 0x45, 0x06
_GROUP = 8
_KILL, _ALLOW = 0x80000000, 0x7FFF0000
_NUMBER, _ARCH, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data


def _error(code: int) -> int:
    return 0x00050000 | code


def build(machine: str) -> bytes:
    """The program for `platform.machine()`, 8 bytes an instruction. Raises ValueError for one that isn't listed."""
    if machine not in AUDIT_ARCH:
        raise ValueError(f"machine={machine!r}: the filter knows the system calls of {', '.join(AUDIT_ARCH)} only")
    column = list(AUDIT_ARCH).index(machine)
    code: list[bytes] = []

    def emit(operation: int, value: int, if_true: int = 0, if_false: int = 0) -> None:
        code.append(struct.pack("=HBBI", operation, if_true, if_false, value))

    def when(test: int, value: int, action: int) -> None:
        emit(test, value, 0, 1)
        emit(_RETURN, action)

    def unless_equal(value: int, action: int) -> None:
        emit(_EQUAL, value, 1, 0)
        emit(_RETURN, action)

    def on_argument(number: int, argument: int, tests: list[tuple[int, int, int]], *, otherwise: int) -> None:
        """For one call: load the low half of an argument, which is all of an int, and apply tests in order."""
        emit(_EQUAL, number, 0, 2 + 2 * len(tests))
        emit(_LOAD, _ARGUMENTS + 8 * argument)
        for test in tests:
            when(*test)
        emit(_RETURN, otherwise)

    refused = _error(errno.EPERM)
    emit(_LOAD, _ARCH)
    unless_equal(AUDIT_ARCH[machine], _KILL)
    emit(_LOAD, _NUMBER)
    when(_ANY_BIT, X32_BIT, _KILL)
    when(_GREATER, LAST_KNOWN, _error(errno.ENOSYS))
    when(_EQUAL, CLONE3[column], _error(errno.ENOSYS))  # its flags are behind a pointer; libc falls back to clone
    denied = sorted(number for numbers in DENIED.values() if (number := numbers[column]) is not None)
    for i in range(0, len(denied), _GROUP):  # the kernel walks the filter for every call when it is installed
        group = denied[i : i + _GROUP]
        emit(_GREATER, group[-1], 2 * len(group), 0)
        for number in group:
            when(_EQUAL, number, refused)
    on_argument(CLONE[column], 0, [(_ANY_BIT, NAMESPACE_FLAGS, refused)], otherwise=_ALLOW)
    for numbers in (SOCKET, SOCKETPAIR):
        on_argument(numbers[column], 0, [(_EQUAL, AF_UNIX, _ALLOW)], otherwise=refused)
    for *call, argument, values in DENIED_ARGUMENT.values():
        tests = [(_EQUAL, value, refused) for value in values]
        on_argument(call[column], argument, tests, otherwise=_ALLOW)
    emit(_RETURN, _ALLOW)
    return b"".join(code)

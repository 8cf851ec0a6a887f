"""The filter as a program, run by a small interpreter of its instructions: both architectures on any machine."""

import errno
import struct

import pytest

from rewards.sandbox import seccomp

ALLOW, KILL = 0x7FFF0000, 0x80000000
EPERM, ENOSYS = (0x00050000 | code for code in (errno.EPERM, errno.ENOSYS))
MACHINES = list(enumerate(seccomp.AUDIT_ARCH))


def run(machine: str, number: int, *arguments: int, arch: int | None = None) -> int:
    """What the filter answers to one call."""
    data = struct.pack("=IIQ", number, seccomp.AUDIT_ARCH[machine] if arch is None else arch, 0)
    data += struct.pack("=6Q", *(*arguments, 0, 0, 0, 0, 0, 0)[:6])
    program = list(struct.iter_unpack("=HBBI", seccomp.build(machine)))
    held, at = 0, 0
    while True:
        operation, if_true, if_false, value = program[at]
        at += 1
        if operation == 0x06:
            return value
        if operation == 0x20:
            held = struct.unpack_from("=I", data, value)[0]
        else:
            holds = {0x15: held == value, 0x25: held > value, 0x45: bool(held & value)}[operation]
            at += if_true if holds else if_false


@pytest.mark.parametrize(("column", "machine"), MACHINES)
def test_listed_calls_are_refused_and_others_are_not(column: int, machine: str) -> None:
    for name, numbers in seccomp.DENIED.items():
        if (number := numbers[column]) is not None:
            assert run(machine, number) == EPERM, name
    listed = {numbers[column] for numbers in seccomp.DENIED.values()}
    others = set(range(seccomp.LAST_KNOWN)) - listed
    special = {seccomp.CLONE3[column], seccomp.SOCKET[column], seccomp.SOCKETPAIR[column]}
    assert {number for number in others if run(machine, number) != ALLOW} == special


@pytest.mark.parametrize(("column", "machine"), MACHINES)
def test_arguments_decide_where_they_must(column: int, machine: str) -> None:
    clone, socket = seccomp.CLONE[column], seccomp.SOCKET[column]
    assert run(machine, clone, 0x11) == ALLOW
    assert run(machine, clone, 0x10000011) == EPERM
    assert [run(machine, socket, family) for family in (1, 2, 10, 16, 17, 40)] == [ALLOW, *[EPERM] * 5]
    assert run(machine, socket, 1 << 32 | 1) == ALLOW  # the kernel, too, reads the low half
    ioctl, fcntl = seccomp.DENIED_ARGUMENT["ioctl"][column], seccomp.DENIED_ARGUMENT["fcntl"][column]
    assert [run(machine, ioctl, 0, command) for command in (0x5412, 0x5413)] == [EPERM, ALLOW]
    assert [run(machine, fcntl, 0, command) for command in (6, 3)] == [EPERM, ALLOW]


@pytest.mark.parametrize(("column", "machine"), MACHINES)
def test_unknown_calls_and_foreign_architectures(column: int, machine: str) -> None:
    assert run(machine, seccomp.LAST_KNOWN + 1) == ENOSYS
    assert run(machine, seccomp.CLONE3[column]) == ENOSYS
    assert run(machine, 0x40000000 | 1) == KILL
    assert run(machine, 1, arch=0x40000003) == KILL  # i386


def test_an_architecture_that_is_not_listed_is_refused() -> None:
    with pytest.raises(ValueError, match="machine='riscv64'"):
        seccomp.build("riscv64")

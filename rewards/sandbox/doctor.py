"""This machine -> which layers of isolation it offers, what is missing and why, what would help.

It starts a real jail and reads how far it came; nothing is inferred from version numbers. Left out: whether a layer
holds once it is there (hostile.py tries that).
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rewards.sandbox.backend import SandboxFault, SandboxUnavailable
from rewards.sandbox.supervisor import Jail
from rewards.sandbox.watch import children

# in the order in which a jail meets them: as root, as anyone else; what it keeps out
_BEFORE = {True: ("kernel", "mounts", "unprivileged user"), False: ("kernel",)}
_AFTER = {True: ("namespaces",), False: ("namespaces", "mounts")}
_EACH_TEST = ("capabilities", "process namespace of a test", "files of a test", "resource limits", "seccomp")
_HOLDS = {
    "kernel": "Linux on x86_64 or aarch64, with process file descriptors",
    "unprivileged user": "programs are nobody on this machine",
    "user namespace": "rights that end at the jail's wall",
    "namespaces": "no network, no other process, no shared memory",
    "mounts": "nothing to read but Python and its libraries, nothing to write",
    "capabilities": "no way back to any right",
    "process namespace of a test": "what a program starts ends with it",
    "files of a test": "a sized /tmp that is gone with the program",
    "resource limits": "processor, memory, processes, files",
    "seccomp": "no ptrace, io_uring, keyctl, bpf, namespaces, foreign calls",
    "memory of all processes": "together under the memory limit (else only each alone)",
}


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One wall of the jail."""

    name: str
    available: bool
    note: str
    """What it is for; where it is missing, why, and what would help."""


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What this machine offers to this user."""

    layers: Sequence[Layer]
    available: bool
    """Whether programs can run here. If not, grade_code's outcome is unknown, `sandbox-unavailable`."""


def diagnose() -> Diagnosis:
    """Start a jail, look, and end it."""
    missing, why, direct, watched = None, "", False, False
    try:
        jail = Jail()
    except SandboxUnavailable as error:
        missing, why = error.layer, error.why
    except SandboxFault as error:
        missing, why = "a jail's process", str(error)
    else:
        direct, watched = jail.direct, bool(list(children(jail.launcher.pid)))
        jail.stop()
    root = os.geteuid() == 0
    user_namespace = () if direct else ("user namespace",)
    order = (*_BEFORE[root], *user_namespace, *_AFTER[root], *_EACH_TEST)
    layers = []
    for name in order:
        reached = missing is None or (missing in order and order.index(name) <= order.index(missing))
        note = _HOLDS[name] if reached else "not tried: something before it is missing"
        if name == missing:
            note = f"{why}; {remedy(name)}"
        layers.append(Layer(name=name, available=reached and name != missing, note=note))
    if missing is not None and missing not in order:
        layers.append(Layer(name=missing, available=False, note=f"{why}; {remedy(missing)}"))
    if missing is None:
        layers.append(Layer(name="memory of all processes", available=watched, note=_HOLDS["memory of all processes"]))
    return Diagnosis(layers=layers, available=missing is None)


def lines(diagnosis: Diagnosis) -> Iterator[str]:
    """For people: one line a layer, then what follows from them."""
    for layer in diagnosis.layers:
        yield f"{'yes' if layer.available else 'NO '}  {layer.name:28} {layer.note}"
    if diagnosis.available:
        yield "Programs run in the jail."
    else:
        yield "Programs are refused: grade_code answers unknown, sandbox-unavailable. There is no weaker fallback."


def remedy(layer: str) -> str:
    """What would help against a missing layer, by what this machine says about itself."""
    if layer == "kernel":
        return "run on Linux 5.12 or later, or use a remote backend (rewards/sandbox/remote.py)"
    if _says("/proc/self/status", "Seccomp:\t2"):
        return "this container's own filter forbids it: start the container with namespaces allowed"
    if layer == "user namespace":
        if _says("/proc/sys/kernel/apparmor_restrict_unprivileged_userns", "1"):
            return "AppArmor forbids it: give Python a profile with `userns`, or set the sysctl of that name to 0"
        if _says("/proc/sys/kernel/unprivileged_userns_clone", "0"):
            return "set sysctl kernel.unprivileged_userns_clone to 1"
        if _says("/proc/sys/user/max_user_namespaces", "0\n"):
            return "raise sysctl user.max_user_namespaces above 0"
    return "run as root with CAP_SYS_ADMIN, or where user namespaces are allowed, or use a remote backend"


def _says(path: str, text: str) -> bool:
    try:
        return text in Path(path).read_text()
    except OSError:
        return False

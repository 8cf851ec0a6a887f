"""The launcher process -> one that sees a minimal read-only root, no network, no other process, and has no rights.

Two ways in, which end alike. As an ordinary user: a user namespace first, and everything in it. As root: the
root directory is built with root's rights (the interpreter may lie where only root can go), then the process
becomes a user of the pool, for good, and enters a user namespace as that user. Where root has no user
namespaces, the launcher stays root and each candidate becomes that user (`direct`). Left out: what is done to
each test's own process (zygote.py).
"""

import importlib
import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from rewards.sandbox import linux, seccomp

DEVICES = ("null", "zero", "full", "random", "urandom")
LINKS = ("/lib", "/lib64", "/usr/lib64")
"""Where the dynamic loader looks, if they are symbolic links."""
LINKED = (
    "_bz2", "_ctypes", "_curses", "_dbm", "_gdbm", "_hashlib", "_lzma", "_sqlite3", "_ssl", "_uuid", "readline", "zlib",
)  # fmt: skip
"""Python's own modules that need a library beside it; those that aren't there are passed over."""
NAMESPACES = (
    linux.CLONE_NEWNS
    | linux.CLONE_NEWPID
    | linux.CLONE_NEWNET
    | linux.CLONE_NEWIPC
    | linux.CLONE_NEWUTS
    | linux.CLONE_NEWCGROUP
)
STAGING = "/tmp"
"""Where the new root is put together, in this process's own mount namespace: the machine's /tmp is untouched."""


class JailError(Exception):
    """A layer that this machine doesn't offer; the text says which and why."""

    def __init__(self, layer: str, why: str) -> None:
        super().__init__(f"{layer}: {why}")
        self.layer, self.why = layer, why


@contextmanager
def layer(name: str) -> Iterator[None]:
    """What fails in it is a JailError with its name."""
    try:
        yield
    except OSError as error:
        raise JailError(name, str(error)) from error


def enter() -> int | None:
    """Close this process in; the user that candidates must change to where it stays root (`direct`), else None.

    Its next fork is process 1 of a new process namespace. Raises JailError with the layer that is missing.
    """
    if sys.platform != "linux" or platform.machine() not in seccomp.AUDIT_ARCH:
        raise JailError("kernel", f"{sys.platform} on {platform.machine()}: needs Linux on x86_64 or aarch64")
    with layer("kernel"):
        proc = os.open("/proc/self", os.O_PATH | os.O_DIRECTORY)
        Path("/proc/self/oom_score_adj").write_text("1000")  # before the trainer, if memory runs out
    sources = _sources()  # it forks, and the first fork in a process namespace would be its process 1
    root, user = os.getuid() == 0, os.getuid()
    direct = None
    if root:
        user = _pool_user()
        with layer("mounts"):
            linux.unshare(linux.CLONE_NEWNS)
            _build_root(*sources)
        if _may_have_user_namespace(user):
            with layer("unprivileged user"):
                become(user)
        else:
            direct = user
    if direct is None:
        with layer("user namespace"):
            _enter_user_namespace(user, proc)
    with layer("namespaces"):
        linux.unshare(NAMESPACES)
    if not root:
        with layer("mounts"):
            _build_root(*sources)
    with layer("capabilities"):
        linux.drop_bounding_set()
        linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
    os.close(proc)
    return direct


def become(user: int) -> None:
    """Root turns into `user`, with no other group and no way back."""
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)


def _pool_user() -> int:
    """A user that nobody else is now: from the upper half of those mapped here, by process id."""
    mapped = [line.split() for line in Path("/proc/self/uid_map").read_text().splitlines()]
    count = min(max(int(length) for first, _, length in mapped if int(first) <= 1), 1 << 31)
    return count - 2 - os.getpid() % (count // 2)


def _may_have_user_namespace(user: int) -> bool:
    child = os.fork()
    if child == 0:
        try:
            become(user)
            linux.unshare(linux.CLONE_NEWUSER)
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1] == 0


def _enter_user_namespace(user: int, proc: int) -> None:
    """A user namespace in which `user` keeps its number; `proc` is this process's folder, still open."""
    group = os.getgid()
    linux.prctl(linux.PR_SET_DUMPABLE, 1)  # changing user gave the files below to root
    linux.unshare(linux.CLONE_NEWUSER)
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        fd = os.open(name, os.O_WRONLY, dir_fd=proc)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)


def _build_root(links: Mapping[str, str], folders: Sequence[str]) -> None:
    """Put folders, read-only, links and five devices on an empty root, and make it the root."""
    linux.mount("none", "/", None, linux.MS_REC | linux.MS_PRIVATE)
    flags = linux.MS_NOSUID | linux.MS_NODEV
    linux.mount("jail", STAGING, "tmpfs", flags, "size=1m,nr_inodes=4096,mode=755")
    os.chdir(STAGING)
    Path("old").mkdir()
    linux.pivot_root(".", "old")
    os.chdir("/")
    for folder in folders:
        Path(folder).mkdir(parents=True, exist_ok=True)
        linux.mount(f"/old{folder}", folder, None, linux.MS_BIND | linux.MS_REC)
        linux.restrict_mounts(folder, linux.MOUNT_ATTR_RDONLY | linux.MOUNT_ATTR_NODEV | linux.MOUNT_ATTR_NOSUID)
        for packages in _installed_packages(folder):
            linux.mount("none", packages, "tmpfs", flags, "size=4k,nr_inodes=2,mode=755")
    for link, target in links.items():
        if not Path(link).exists():
            Path(link).parent.mkdir(parents=True, exist_ok=True)
            Path(link).symlink_to(target)
    for folder in ("/dev", "/tmp"):
        Path(folder).mkdir(exist_ok=True)
    for device in DEVICES:
        Path(f"/dev/{device}").touch()
        linux.mount(f"/old/dev/{device}", f"/dev/{device}", None, linux.MS_BIND)
    Path("/dev/shm").symlink_to("/tmp")  # one sized file system serves both
    linux.unmount("/old")
    Path("/old").rmdir()
    linux.restrict_mounts("/", linux.MOUNT_ATTR_RDONLY | linux.MOUNT_ATTR_NOSUID)


def _sources() -> tuple[dict[str, str], list[str]]:
    """Symbolic links (path -> target) and real folders that the interpreter needs."""
    library = str(Path(os.__file__).parent)
    links = {path: os.path.realpath(path) for path in (*LINKS, sys.base_prefix, library)}
    folders = {os.path.realpath(library), *_shared_library_folders()}
    outer = sorted(folder for folder in folders if not any(folder.startswith(f"{other}/") for other in folders))
    return {path: target for path, target in links.items() if path != target}, outer


def _shared_library_folders() -> list[str]:
    """Where the libraries lie that Python's own modules are linked with: a fork imports those and looks."""
    receiving, sending = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            for name in LINKED:
                with suppress(ImportError):
                    importlib.import_module(name)
            files = {line.split(maxsplit=5)[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
            libraries = {str(Path(file).parent) for file in files if file[0] == "/" and ".so" in Path(file).name}
            os.write(sending, "\n".join(libraries).encode())
        finally:
            os._exit(0)
    os.close(sending)
    with open(receiving, encoding="utf-8") as found:  # noqa: PTH123
        folders = found.read().split("\n")
    os.waitpid(child, 0)
    return folders


def _installed_packages(folder: str) -> Iterator[str]:
    """Folders of installed packages under it: this project, or hidden tests, may be among them."""
    for pattern in ("site-packages", "dist-packages", "python3*/site-packages", "python3*/dist-packages"):
        yield from (str(path) for path in Path(folder).glob(pattern) if path.is_dir() and not path.is_symlink())

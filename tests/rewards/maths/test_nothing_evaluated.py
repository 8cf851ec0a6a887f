"""No text from outside is ever compiled or run by the maths grader: read from the source, and watched at run time."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

BUILTINS = {"eval", "exec", "compile", "__import__"}
SYMPY = {"sympify", "S", "symbols", "nsimplify", "parse_expr", "parse_latex", "lambdify", "autowrap", "ufuncify", "var"}
"""Sympy's functions that evaluate text, or can."""


def evaluators(source: str) -> list[str]:
    """Every mention of a function that can run text, called or not; `S.Pi` and the like are plain constants."""
    tree = ast.parse(source)
    constants = {node.value for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    sympy = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sympy")
        for alias in node.names
        if alias.name in SYMPY
    }
    found = []
    for node in ast.walk(tree):
        match node:
            case ast.Name(name) if name in BUILTINS or (name in sympy and not (name == "S" and node in constants)):
                found.append(name)
            case ast.Attribute(ast.Name(module), name) if (module == "builtins" and name in BUILTINS) or (
                module == "sympy" and name in SYMPY
            ):
                found.append(f"{module}.{name}")
            case ast.ImportFrom(module) if module and module.startswith("sympy") and "parsing" in module:
                found.append(module)
            case ast.Import(names):
                found += [alias.asname for alias in names if alias.name.startswith("sympy") and alias.asname]
    return found


def test_rewards_mention_nothing_that_evaluates() -> None:
    found = {str(path): evaluators(path.read_text()) for path in sorted((ROOT / "rewards").rglob("*.py"))}
    assert {path: names for path, names in found.items() if names} == {}
    assert len(found) > 20


@pytest.mark.parametrize(
    "source",
    [
        "eval(text)",
        "run = exec",
        "import builtins; builtins.compile(text, '', 'eval')",
        "import sympy; sympy.sympify(text)",
        "import sympy; map(sympy.S, texts)",
        "from sympy import S; S(text)",
        "from sympy import sympify as harmless; harmless(text)",
        "from sympy.parsing.latex import parse_latex",
        "from sympy.parsing import sympy_parser",
        "import sympy as sp; sp.S(text)",
    ],
)
def test_evaluator_is_seen(source: str) -> None:
    assert evaluators(source) != []


def test_what_only_looks_like_one_is_not() -> None:
    harmless = "import re, sympy; from sympy import S; re.compile('a'); model.eval(); S.Pi; sympy.Symbol('x')"
    assert evaluators(harmless) == []


HOSTILE = [
    r"__import__('os').system('touch CANARY')*\pi",
    r"\boxed{__import__('os').system('touch CANARY')}",
    r"\boxed{x + (lambda: open('CANARY', 'w'))()}",
    r"\boxed{\sin(open('CANARY', 'w'))}",
    r"\boxed{\text{__import__('subprocess').run(['touch', 'CANARY'])}}",
    r"\boxed{\operatorname{exec}(\operatorname{open}(CANARY).read())}",
    r"\boxed{x_{__import__('os').system('touch CANARY')}}",
    r"\boxed{().__class__.__base__.__subclasses__()[CANARY]}",
    r"\boxed{\sum_{CANARY=1}^{n} CANARY}",
    r"\boxed{\sqrt{CANARY^2} + \frac{CANARY}{CANARY}}",
    "<answer>eval(\"__import__('os').system('touch CANARY')\")</answer>",
    "#### exec('CANARY')",
]

WATCH = """
import os, sys

def watch(event, arguments):
    if event in ("compile", "exec", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "pickle.find_class"):
        caller = sys._getframe(1).f_code.co_filename
        what = arguments[0]
        if hasattr(what, "co_code"):
            text = repr((what.co_filename, what.co_name, what.co_names, what.co_consts))
        else:
            text = repr(what)
        log.append((event, caller, text))

log = []
sys.addaudithook(watch)
"""

WORKER = (
    WATCH
    + """
import json
from rewards.maths import symbolic_worker as worker

def lines(*arguments, read=worker._lines):
    log.clear()  # sympy is imported by now, which evaluates much of its own
    yield from read(*arguments)
    with open(os.environ["WATCHED"], "w") as file:
        json.dump(log, file)

worker._lines = lines
worker.main()
"""
)

PARENT = (
    WATCH
    + r"""
import json
from fractions import Fraction
from rewards.maths import symbolic
from rewards.maths.grade import grade_math
from rewards.maths.tree import *

symbolic.COMMAND = (sys.executable, "-P", "-c", os.environ["WORKER"])
symbolic.MAX_WORKERS = 1
symbolic._pool = symbolic._Pool()
texts = json.loads(os.environ["HOSTILE"])
grade_math(r"\sqrt2 + \sqrt3", r"\sqrt{5 + 2\sqrt6}")  # imports all there is
symbolic.start()
log.clear()
one, half = Number(Fraction(1)), Number(Fraction(1, 2))
root_2, root_3, root_24 = (Power(Number(Fraction(n)), half) for n in (2, 3, 24))
nested = Power(Sum((Number(Fraction(5)), root_24)), half)  # sympy's radsimp would evaluate text for this one
assert symbolic.equal(nested, Sum((root_2, root_3))).equal is True
for text in texts:
    # Past the parser: as it is, in every place where a tree holds text.
    name = Variable(text)
    call = Function(text, (name, Function("eval", (name,)), Function("sum", (name, name, one, Variable("n")))))
    same = symbolic.equal(Sum((call, name)), Sum((name, Product((call, one)))))
    assert same.equal is True, same
    assert symbolic.equal(call, Power(name, call)).equal is None
    for gold, response in ((text, text), (text, "x + 1"), ("x + 1", text), (text, text + " ")):
        grade_math(gold, response)
worker = symbolic._pool.workers[0]
worker._wire.close()  # hangs up, so that the worker ends on its own and writes what it saw
assert worker._process.wait(30) == 0
print(json.dumps(log))
"""
)


def test_hostile_text_is_never_compiled(tmp_path: Path) -> None:
    watched = tmp_path / "watched.json"
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "WORKER": WORKER,
        "WATCHED": str(watched),
        "HOSTILE": json.dumps(HOSTILE),
    }
    done = subprocess.run(
        [sys.executable, "-c", PARENT], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []  # the parent compiled and ran nothing at all
    seen = json.loads(watched.read_text())
    assert [entry for entry in seen if "CANARY" in "".join(entry)] == []
    # Sympy writes itself functions that add exponents, from the number of variables, and imports late.
    assert {Path(caller).name for _, caller, _ in seen} <= {"monomials.py", "<frozen importlib._bootstrap>"}
    assert seen, "the watch sees nothing"
    assert not (tmp_path / "CANARY").exists()

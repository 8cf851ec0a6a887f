"""A clock that jumps changes nothing: deadlines are monotonic, and no id is made of the time."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]

WALL_CLOCK = {
    *("time.time", "time.time_ns", "time.localtime", "time.gmtime", "time.strftime", "time.ctime", "time.asctime"),
    *("time.clock_gettime", "datetime.now", "datetime.utcnow", "datetime.today", "date.today", "uuid.uuid1"),
}
# Where it names or records a start or a person's decision, and where a file gets a time to be watched.
ALLOWED = {
    ("runtime/run_folder.py", "datetime.now"),
    ("distill/generate.py", "datetime.now"),
    ("distill/review/decisions.py", "datetime.now"),
    ("recipes/r1.py", "datetime.now"),
    ("sampling/serve.py", "time.strftime"),
    ("rewards/sandbox/hostile.py", "time.time_ns"),
}


def wall_clock(source: str) -> set[str]:
    """The calls in a source that read the wall clock, and imports that would hide them."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            found.add(".".join(ast.unparse(node).split(".")[-2:]))
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found & WALL_CLOCK


def test_no_deadline_and_no_id_reads_the_wall_clock() -> None:
    packages = [path.parent for path in ROOT.glob("*/__init__.py")]
    assert len(packages) >= 7
    found = {
        (str(path.relative_to(ROOT)), name)
        for package in packages
        for path in package.rglob("*.py")
        for name in wall_clock(path.read_text())
    }
    assert found - ALLOWED == set()
    assert ("runtime/run_folder.py", "datetime.now") in found


def test_every_way_of_reading_it_is_seen() -> None:
    assert wall_clock("import time\ndeadline = time.time() + 1") == {"time.time"}
    assert wall_clock("from time import time\ntime()") == {"time.time"}
    assert wall_clock("import datetime\ndatetime.datetime.now()") == {"datetime.now"}
    assert wall_clock("call(clock=time.time)") == {"time.time"}
    assert wall_clock("time.monotonic(); time.perf_counter(); tracker.time") == set()

"""Whole commands of a recipe that can be killed, in one process or several."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]


class Ended(NamedTuple):
    """What came of a command."""

    code: int
    """Its exit code, or minus the signal that ended it; of the first process."""
    codes: list[int]
    """Of all its processes."""
    seconds: float
    output: str
    """What all its processes said."""


class Forks:
    """`python -m` of a recipe, as children of tests/zygote.py, which has paid for the imports."""

    def __init__(self, recipe: str, folder: Path, *, disk: str | None = None) -> None:
        """recipe: recipes.sft, say. folder: has the settings, run.yaml, and gets output; the commands can import what
        is in it. disk: options of a tmpfs at folder/disk, say "size=4m"."""
        self.folder = folder
        (folder / "disk").mkdir()
        # A small disk is a mount that only the commands see.
        mount = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o "$1" none "$2" && shift 2 && exec "$@"', "sh"]
        mounted = [] if disk is None else [*mount, disk, str(folder / "disk")]
        self._zygote = subprocess.Popen(
            [*mounted, sys.executable, str(ROOT / "tests/zygote.py"), recipe],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)])},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(
        self,
        run_dir: Path,
        *flags: str,
        processes: int = 1,
        kill_after: float | None = None,
        signum: int = signal.SIGKILL,
        **environment: str,
    ) -> Ended:
        """Run it to its end with these flags and variables, and with --resume, which also starts a run.

        kill_after: seconds after which all its processes get the signal.
        """
        outputs = [self.folder / f"output-{rank}" for rank in range(processes)]
        request = dict(
            arguments=["--config", str(self.folder / "run.yaml"), "--run_dir", str(run_dir), "--resume", *flags],
            environment=environment,
            outputs=list(map(str, outputs)),
            kill_after=kill_after,
            signum=int(signum),
        )
        assert self._zygote.stdin is not None and self._zygote.stdout is not None
        self._zygote.stdin.write(json.dumps(request) + "\n")
        self._zygote.stdin.flush()
        codes, seconds = json.loads(self._zygote.stdout.readline())
        return Ended(codes[0], codes, seconds, "".join(output.read_text() for output in outputs))

    @property
    def disk(self) -> Path:
        """folder/disk as the commands see it."""
        return Path(f"/proc/{self.pid}/root{self.folder}/disk")

    @property
    def pid(self) -> int:
        """The process whose children the commands are."""
        return self._zygote.pid

    def close(self) -> None:
        """It leaves when its input ends."""
        self._zygote.communicate()

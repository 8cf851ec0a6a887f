"""What is set for a process."""

import subprocess
import sys

import pytest

FAULTS = """
import resource
from runtime.environment import keep_freed_memory
{keep}
def use():
    for part in [bytearray(3 << 20) for _ in range(8)]:
        part[::4096] = bytes(len(part) // 4096)
use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(keep: str) -> int:
    done = subprocess.run([sys.executable, "-c", FAULTS.format(keep=keep)], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's")
def test_freed_memory_is_used_again() -> None:
    """Five times 24 MiB are 30,720 pages of 4 KiB."""
    assert faults("") > 10_000
    assert faults("keep_freed_memory()") < 1_000

"""What is set for a process."""

import subprocess
import sys

import pytest

FAULTS = """
import resource
from runtime.environment import keep_freed_memory
{keep}
def use():
    for part in [bytearray({size}) for _ in range((24 << 20) // {size})]:
        part[::4096] = bytes(len(part) // 4096)
use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(keep: str, size: int) -> int:
    code = FAULTS.format(keep=keep, size=size)
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's")
@pytest.mark.parametrize("size", [3 << 20, 1 << 16], ids=["pages of their own", "pages of the heap"])
def test_freed_memory_is_used_again(size: int) -> None:
    """Five times 24 MiB are 30,720 pages of 4 KiB."""
    assert faults("", size) > 10_000
    assert faults("keep_freed_memory()", size) < 1_000

import errno
import os
import resource
import signal
from io import FileIO
from pathlib import Path

import pytest

from runtime.errors import DISK_FAULTS, DiskError, disk_fault
from runtime.files import make_folder, replacing, write_all, write_durably, writing


def names(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir()]


@pytest.mark.parametrize(
    ("failpoint", "left"),
    [("file/before-fsync", "old"), ("file/before-rename", "old"), ("file/before-fsync-folder", "new")],
)
def test_killed_while_replacing_leaves_old_or_new(tmp_path: Path, failpoint: str, left: str) -> None:
    path = tmp_path / "f"
    write_durably(path, "old")
    if (pid := os.fork()) == 0:
        os.environ["FAILPOINT"] = failpoint
        try:
            write_durably(path, "new")
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert path.read_text() == left
    write_durably(path, "again")
    assert path.read_text() == "again" and names(tmp_path) == ["f"]


def test_error_while_replacing_leaves_the_old_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "f"
    write_durably(path, b"old")

    def interrupted() -> None:
        with replacing(path) as aside:
            aside.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old" and names(tmp_path) == ["f"]


def test_full_disk_is_named_with_file_reason_and_remedy(tmp_path: Path) -> None:
    with pytest.raises(DiskError) as error, writing(tmp_path / "f"), Path("/dev/full").open("w") as f:
        f.write("x")
    assert str(error.value) == f"{tmp_path}/f: No space left on device; free space"
    assert error.value.errno == errno.ENOSPC and isinstance(error.value.__cause__, OSError)


def test_failing_disk_is_told_from_a_full_one(tmp_path: Path) -> None:
    # Nothing is mapped at address 0, so that writing there is an I/O error.
    with pytest.raises(DiskError, match=r"f: Input/output error; check the disk"):
        with writing(tmp_path / "f"), Path("/proc/self/mem").open("rb+", buffering=0) as f:
            f.write(b"x")


def test_inner_file_is_the_one_that_is_named(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match="inner: No space"):
        with writing(tmp_path / "outer"), writing(tmp_path / "inner"):
            raise OSError(errno.ENOSPC, "?")


def test_other_errors_pass_through(tmp_path: Path) -> None:
    for error in (FileNotFoundError(errno.ENOENT, "?"), ValueError("?"), RuntimeError("x (os error 2)")):
        with pytest.raises(type(error)), writing(tmp_path / "f"):
            raise error
        assert disk_fault(error) is None
    assert {disk_fault(Exception(f"I/O error: text (os error {number})")) for number in DISK_FAULTS} == set(DISK_FAULTS)


def test_short_write_is_gone_on_with_not_taken_for_a_whole_one(tmp_path: Path) -> None:
    path = tmp_path / "f"
    if (pid := os.fork()) == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (400, 400))
        code = 0
        try:
            with FileIO(path, "w") as file:
                write_all(file, b"x" * 600)  # the first write takes 400 bytes and says so; only the second fails
        except OSError as error:
            code = error.errno or 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == errno.EFBIG
    assert path.stat().st_size == 400


def test_folders_are_made_once(tmp_path: Path) -> None:
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        make_folder(tmp_path / "file" / "b")

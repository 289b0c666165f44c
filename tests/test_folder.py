"""Claims, probes and whole-or-nothing writes of output folders."""

import errno
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from lightbulb.folder import FolderError, FolderInUse, built_beside, check_writable, claim, write_atomically

HOLDER = """
import sys, time
from pathlib import Path
from lightbulb.folder import claim
with claim(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_second_claim_names_folder_and_owner(tmp_path: Path) -> None:
    with claim(tmp_path / "run"), pytest.raises(FolderInUse) as caught, claim(tmp_path / "run"):
        pass
    assert str(tmp_path / "run") in str(caught.value)
    assert f"{os.getpid()}@{socket.gethostname()}" in str(caught.value)


def test_claim_is_free_after_the_block(tmp_path: Path) -> None:
    for _ in range(2):
        with claim(tmp_path / "run") as folder:
            assert folder.is_dir()


def test_claim_of_a_killed_process_is_free(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    with pytest.raises(FolderInUse, match=str(holder.pid)), claim(tmp_path):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    with claim(tmp_path):
        pass


def test_folder_deleted_under_its_claim_can_be_claimed_again(tmp_path: Path) -> None:
    with claim(tmp_path / "run") as folder:
        shutil.rmtree(folder)
        with claim(folder):
            assert folder.is_dir()


def test_claim_below_a_file_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FolderError, match="a file stands where a folder is needed"), claim(tmp_path / "file" / "run"):
        pass


def test_check_writable_compares_space(tmp_path: Path) -> None:
    check_writable(tmp_path / "new", need_bytes=1)
    assert list((tmp_path / "new").iterdir()) == []
    with pytest.raises(FolderError, match=r"full \(1048576.0 MB needed, \d+\.\d MB free\); free some space"):
        check_writable(tmp_path, need_bytes=1 << 40)


@pytest.mark.parametrize(
    ("code", "cause"),
    [(errno.EROFS, "read-only"), (errno.EACCES, "no permission"), (errno.ENOSPC, "disk is full")],
    ids=["read_only", "permission", "full"],
)
def test_check_writable_explains_the_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, cause: str
) -> None:
    def refuse(dir: Path) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(FolderError, match=cause) as caught:
        check_writable(tmp_path)
    assert caught.value.errno == code and str(caught.value).startswith(str(tmp_path))


def test_write_replaces_the_content(tmp_path: Path) -> None:
    path = tmp_path / "latest"
    write_atomically(path, "one")
    write_atomically(path, b"two")
    assert path.read_bytes() == b"two"
    assert os.listdir(tmp_path) == ["latest"]


def test_failed_write_leaves_the_old_content_and_no_rest(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write_atomically(path, "old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(FolderError, match=r"state\.json: the file-size limit .* \(1\.0 MB needed\)"):
            write_atomically(path, bytes(1 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["state.json"]


def test_full_disk_at_the_last_moment_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.json"
    write_atomically(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FolderError, match="disk is full"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["state.json"]


def test_a_folder_built_beside_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with built_beside(out) as partial:
        (partial / "file").write_text("new")
        assert not out.exists() and partial.parent == out.parent
    assert (out / "file").read_text() == "new" and os.listdir(out.parent) == ["out"]
    with pytest.raises(KeyError), built_beside(tmp_path / "other") as partial:
        (partial / "file").write_text("new")
        raise KeyError
    assert os.listdir(tmp_path) == ["deep"]


def test_a_folder_is_not_built_over_another(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with built_beside(tmp_path / "out") as partial:  # an empty one is as good as none
        (partial / "file").write_text("mine")
    for taken in (tmp_path / "out", tmp_path / "out" / "file"):
        with pytest.raises(FolderError, match="there is something already; choose another"), built_beside(taken):
            pass
    assert (tmp_path / "out" / "file").read_text() == "mine"

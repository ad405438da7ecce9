"""The run folder: who holds it, and what it says when the disk is full."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from d2ft_fl.errors import RunError
from d2ft_fl.records.run_folder import note_failure, only_one, read_status, write_status
from d2ft_fl.util.files import writing

HOLD = """
import sys, time
from pathlib import Path
from d2ft_fl.records.run_folder import only_one
with only_one(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_who_is_in_the_way_is_named_with_what_to_do(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as other:
        try:
            other.stdout.readline()
            pid = other.pid
            said = rf"another process \({pid}\) is at work on .*; stop it first: kill {pid}$"
            with pytest.raises(RunError, match=said), only_one(tmp_path):
                pass
        finally:
            other.kill()
    with only_one(tmp_path):
        pass


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_run_on_a_full_disk_is_called_failed(tmp_path, monkeypatch):
    """No new file can be written, but the one that is there has room."""
    write_status(tmp_path, "running")
    monkeypatch.setattr(Path, "write_text", full)
    note_failure(tmp_path, "the disk is full, which is a longer line than was there before")
    assert read_status(tmp_path)["status"] == "failed"
    assert read_status(tmp_path)["reason"].startswith("the disk is full")
    note = read_status(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]
    monkeypatch.undo()
    write_status(tmp_path, "running")
    monkeypatch.setattr(Path, "write_text", full)
    write_status(tmp_path, "failed")  # shorter than what was there
    assert read_status(tmp_path) == {**note, "reason": ""}


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        SafetensorError("Error while serializing: I/O error: No space left (os error 28)"),
    ],
)
def test_what_cannot_be_written_is_named(tmp_path, error):
    def fail():
        with writing(tmp_path):
            raise error

    with pytest.raises(RunError) as told:
        fail()
    assert str(told.value).startswith(f"{str(tmp_path)!r} cannot be written to: ")
    assert str(told.value).endswith("; make room there, and go on with d2ft run --resume")


FULL_DISK = """
mount -t tmpfs -o size=700k none "$1" && shift
"$@" 2>&1
cat "$0/status.json"
"""


def test_a_run_whose_disk_is_full_says_so_in_one_line_and_its_status_too(tmp_path):
    """A disk for about one checkpoint; the model's file is larger."""
    if subprocess.run(["unshare", "--mount", "true"], check=False).returncode:
        pytest.skip("needs leave to make a mount namespace")
    disk = tmp_path / "disk"
    disk.mkdir()
    run = disk / "run"
    options = {"run-folder": run, "clients": 2, "train-examples": 40, "test-examples": 20}
    pairs = [x for key, value in options.items() for x in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "d2ft_fl.cli", "run", "--backend", "local", *pairs, "--json"]
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", FULL_DISK, str(run), str(disk), *command],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    said, status = done.stdout.splitlines()
    assert said.startswith(f"d2ft: '{run}/")
    assert "cannot be written to: No space left on device; make room there" in said
    assert json.loads(status) == {"status": "failed", "reason": said.removeprefix("d2ft: ")}

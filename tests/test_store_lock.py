"""One process at a time works on a run, and a dead process does not keep the lock."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from store_shards import in_child, run_folder
from stylemill.errors import LockedError
from stylemill.store.lock import RunLock, file_lock, lock_holder
from stylemill.store.paths import RunPaths

HOLD = r"""
import os, sys
from pathlib import Path
from stylemill.store.lock import RunLock
from stylemill.store.paths import RunPaths
with RunLock(RunPaths(Path(sys.argv[1]), 1)):
    if sys.argv[2:] == ["fork"] and os.fork() == 0:
        os.write(1, b"child %d\n" % os.getpid())
        sys.stdin.read()
        os._exit(0)
    os.write(1, b"held\n")
    sys.stdin.read()
"""


def hold(paths: RunPaths, *how: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, str(paths.output), *how],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def lines(process: subprocess.Popen[str], count: int) -> list[str]:
    assert process.stdout is not None
    return sorted(process.stdout.readline().strip() for _ in range(count))


@pytest.mark.parametrize("how", [[], ["fork"]])
def test_the_lock_is_refused_while_its_holder_is_alive_and_taken_over_after_its_death(
    tmp_path: Path, how: list[str]
) -> None:
    paths = run_folder(tmp_path)
    with hold(paths, *how) as other:
        child = [int(line.split()[1]) for line in lines(other, 1 + len(how)) if line.startswith("child")]
        process = f"pid {other.pid} on host {socket.gethostname()}"
        assert lock_holder(paths) == process
        with pytest.raises(LockedError, match=process), RunLock(paths):
            pass
        os.kill(other.pid, signal.SIGKILL)
        other.wait()
        for pid in child:
            os.kill(pid, 0)  # the forked child is alive, and does not hold the lock
        assert lock_holder(paths) is None
        with RunLock(paths):
            assert lock_holder(paths) == f"pid {os.getpid()} on host {socket.gethostname()}"
    assert not paths.lock.exists()
    assert lock_holder(paths) is None


def test_a_second_run_in_the_same_process_is_refused(tmp_path: Path) -> None:
    paths = run_folder(tmp_path)
    with RunLock(paths):
        with pytest.raises(LockedError), RunLock(paths):
            pass
        assert in_child(lambda: RunLock(paths).__enter__() and None) == 1  # also in a forked child
        assert lock_holder(paths) is not None
    with RunLock(paths):
        pass


def test_waiting_processes_get_the_lock_one_after_another(tmp_path: Path) -> None:
    """Also though the lock file is removed and created again each time."""
    counter = tmp_path / "counter"
    counter.write_text("0")

    def count() -> None:
        for _ in range(50):
            with file_lock(tmp_path / "lock"):
                counter.write_text(str(int(counter.read_text()) + 1))

    children = []
    for _ in range(4):
        child = os.fork()
        if child == 0:
            count()
            os._exit(0)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert counter.read_text() == "200"

"""Signs of life while something takes long, and children that end with their whole family."""

import os
import re
import threading
from pathlib import Path

import pytest

from canvasrt.pipeline import child as children
from canvasrt.pipeline.child import ChildProcesses
from canvasrt.pipeline.fetch import Reports
from triton_servers import wait_until


def test_a_fetch_says_how_much_has_come(tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / ".cache").mkdir()
    with Reports(said.append, "fetching x", tmp_path, 4_000_000, seconds=0.05):
        (tmp_path / "a").write_bytes(bytes(1_000_000))
        (tmp_path / ".cache" / "b.incomplete").write_bytes(bytes(1_000_000))
        wait_until(lambda: "50%" in "".join(said), 10, lambda: str(said))
    assert re.fullmatch(r"fetching x: 50%, 2\.0 MB of 4\.0 MB, [0-9.]+ .B/s", said[-1])
    assert threading.active_count() == len(threading.enumerate())


def test_a_child_says_that_it_lives_and_gives_its_exit_code(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []
    (tmp_path / "a").write_bytes(bytes(1_500_000))
    lock = os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT)
    script = f"ls /proc/self/fd/{lock} && echo $GIVEN; sleep 0.3; exit 7"
    try:
        code = ChildProcesses(said.append, 0.1).run("build", ["/bin/sh", "-c", script], {"GIVEN": "x"}, lock, tmp_path)
    finally:
        os.close(lock)
    assert code == 7
    assert said[0] == "build: 0 s so far, 1.5 MB written"
    assert capfd.readouterr() == ("", f"/proc/self/fd/{lock}\nx\n")  # standard output is for the result alone


def test_a_child_that_does_not_want_to_end_is_killed_with_its_own_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(children, "_END_SECONDS", 0.2)
    processes = ChildProcesses(lambda line: None)
    script = f"trap '' TERM; sleep 60 & echo $! > {tmp_path}/pid; mv {tmp_path}/pid {tmp_path}/there; wait; wait"
    given = ("build", ["/bin/sh", "-c", script], dict(os.environ), 2, tmp_path)
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(processes.run(*given)))
    thread.start()
    wait_until((tmp_path / "there").exists, 10, lambda: "not started")
    grandchild = int((tmp_path / "there").read_text())
    processes.end()
    thread.join(10)
    assert not thread.is_alive()
    wait_until(lambda: not _runs(grandchild), 10, lambda: f"{grandchild} lives")


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False

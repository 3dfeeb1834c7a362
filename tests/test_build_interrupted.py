"""A build that is cut off, by a full disk, Ctrl-C or a dead process, leaves what was there before and nothing else."""

import contextlib
import os
import pty
import re
import resource
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest

from builds import Builds, canvasrt, listing, options
from bundles import names
from canvasrt.bundle.reader import EngineBundle
from canvasrt.bundle.writer import BundleWriter
from canvasrt.compile import compiler
from canvasrt.compile.buildplan import BuildPlan
from canvasrt.compile.job import build, prepare
from canvasrt.errors import BundleError, CapacityError
from planning import ROOT

PROFILE = "rtx-5090"
# Within which Ctrl-C ends a build that would go on for half a minute: 5 s at most where nothing else runs, 13 were seen
# on a busy machine.
PROMPT_SECONDS = 20
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


def limited(nbytes: int) -> Callable[[], None]:
    """Files may not grow beyond this, which stands for a full disk: the kernel refuses the write, not a patch."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, nbytes))

    return limit


@pytest.fixture(params=["nothing", "a bundle"])
def place(request: pytest.FixtureRequest, builds: Builds, tmp_path: Path) -> Path:
    """Where a bundle of the tiny checkpoint is to be put, with --force."""
    out = tmp_path / "engines" / "tiny"
    out.parent.mkdir()
    if request.param == "a bundle":
        shutil.copytree(builds.bundle("tiny", "l40s").path, out)
    return out


@pytest.mark.parametrize(
    ("checkpoint", "nbytes", "parts"),
    [
        ("tiny", 5_000_000, ["text.engine: files may not grow larger here", "(ulimit -f)"]),
        ("demo", 100_000, ["tiny.partial: files may not grow larger here, at least", "(ulimit -f)"]),
        ("demo", 2_000, ["config.json: files may not grow larger here", "(ulimit -f)"]),
    ],
    ids=["the plan", "the weights that the compiler points to", "the first file"],
)
def test_a_full_disk_is_named_and_nothing_half_written_stays(
    builds: Builds, place: Path, checkpoint: str, nbytes: int, parts: list[str]
) -> None:
    before = listing(place.parent)
    arguments = options(builds.checkpoint(checkpoint), PROFILE, place, "--force")
    done = canvasrt("build", *arguments, before=limited(nbytes))
    assert (done.returncode, done.stdout) == (3, ""), done.stderr
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert [part for part in parts if part not in error] == [], error
    assert "Traceback" not in done.stderr
    assert listing(place.parent) == before


class Running:
    """``canvasrt build`` on a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        self.terminal, stderr = pty.openpty()
        command = [sys.executable, "-m", "canvasrt.cli.main", "build", *arguments]
        self.process = subprocess.Popen(command, stderr=stderr, stdout=subprocess.PIPE, cwd=ROOT, text=True)
        os.close(stderr)
        self.shown = ""

    def read(self, pattern: str | None = None, timeout: float = 300) -> float:
        """Until something is shown, or to the end; how long it took."""
        started = time.monotonic()
        with contextlib.suppress(OSError):  # what a terminal gives at the end of its other side
            while time.monotonic() < started + timeout:
                ready, _, _ = select.select([self.terminal], [], [], 1)
                if ready:
                    self.shown += os.read(self.terminal, 65_536).decode(errors="replace")
                if pattern is not None and re.search(pattern, ESCAPE.sub("", self.shown)):
                    return time.monotonic() - started
        assert pattern is None, f"{pattern} was not shown: {self.shown}"
        return time.monotonic() - started

    def last(self) -> str:
        """The last lines without bars."""
        lines = ESCAPE.sub("", self.shown).splitlines()
        return "\n".join([line for line in lines if line.strip() and "━" not in line][-5:])

    def end(self) -> int:
        self.read()
        code = self.process.wait(timeout=60)
        os.close(self.terminal)
        out: IO[str] | None = self.process.stdout
        assert out is not None
        out.close()
        return code


MOMENTS = {
    "the compiler starts": r"Computing reformatting costs",
    "most of the work": r"Determining refit engines",
    "near the end": r"Determining refit engines.*1/1",
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_ctrl_c_ends_a_build_soon_and_leaves_what_was_there(builds: Builds, place: Path, moment: str) -> None:
    """The larger checkpoint, stripped: half a minute of compiling, most of it in what the compiler calls one step."""
    before = listing(place.parent)
    checkpoint = builds.checkpoint("nvfp4-experts")
    running = Running(*options(checkpoint, PROFILE, place, "--weights", "stripped", "--force"))
    running.read(MOMENTS[moment])
    running.process.send_signal(signal.SIGINT)
    started = time.monotonic()
    code = running.end()
    assert code == 130, running.last()
    assert time.monotonic() - started < PROMPT_SECONDS
    assert "Traceback" not in running.shown
    assert "FATAL" not in running.shown
    assert listing(place.parent) == before
    assert names(place.parent) == (["tiny"] if before else [])


def test_ctrl_c_is_answered_with_a_word(builds: Builds, tmp_path: Path) -> None:
    running = Running(*options(builds.checkpoint("tiny"), PROFILE, tmp_path / "out"))
    running.read(MOMENTS["the compiler starts"])
    running.process.send_signal(signal.SIGINT)
    assert running.end() == 130
    assert "interrupted" in running.shown


def test_who_presses_ctrl_c_twice_gets_no_crash_either(builds: Builds, tmp_path: Path) -> None:
    checkpoint = builds.checkpoint("nvfp4-experts")
    running = Running(*options(checkpoint, PROFILE, tmp_path / "out", "--weights", "stripped"))
    running.read(MOMENTS["most of the work"])
    for _ in range(2):
        running.process.send_signal(signal.SIGINT)
        time.sleep(0.3)
    assert running.end() == 130, running.last()
    assert "Traceback" not in running.shown
    assert names(tmp_path) == []


def test_progress_is_shown_on_a_terminal_by_phase(builds: Builds, tmp_path: Path) -> None:
    running = Running(*options(builds.checkpoint("tiny"), PROFILE, tmp_path / "out"))
    assert running.end() == 0
    assert re.search(r"Computing reformatting costs.* 1/1 ", ESCAPE.sub("", running.shown))
    assert "experts: capacity: 128 tokens per expert" in ESCAPE.sub("", running.shown)


def test_after_a_killed_build_the_next_one_succeeds(builds: Builds, place: Path) -> None:
    before = listing(place)
    arguments = options(builds.checkpoint("tiny"), PROFILE, place, "--force")
    running = Running(*arguments)
    running.read(MOMENTS["the compiler starts"])
    running.process.kill()
    assert running.end() == -signal.SIGKILL
    assert listing(place) == before
    assert f"{place.name}.partial" in names(place.parent)
    done = canvasrt("build", *arguments)
    assert done.returncode == 0, done.stderr
    assert EngineBundle.open(place).manifest.target.profile == PROFILE
    assert names(place.parent) == ["tiny"]


def test_one_build_at_a_time_has_a_target(builds: Builds, tmp_path: Path) -> None:
    arguments = options(builds.checkpoint("tiny"), PROFILE, tmp_path / "out")
    first = Running(*arguments)
    first.read(MOMENTS["the compiler starts"])
    started = time.monotonic()
    second = canvasrt("build", *arguments)
    assert (second.returncode, second.stdout) == (2, "")
    assert f"error: another build of {tmp_path}/out is running: wait for it, or name another target" in second.stderr
    assert time.monotonic() - started < 30
    assert first.end() == 0
    assert EngineBundle.open(tmp_path / "out").manifest.target.profile == PROFILE
    assert names(tmp_path) == ["out"]


def test_builds_of_two_targets_side_by_side_do_not_disturb_each_other(builds: Builds, tmp_path: Path) -> None:
    checkpoint = builds.checkpoint("tiny")
    both = [Running(*options(checkpoint, profile, tmp_path / profile)) for profile in ("rtx-5090", "l40s")]
    assert [running.end() for running in both] == [0, 0]
    assert names(tmp_path) == ["l40s", "rtx-5090"]
    for name in names(tmp_path):
        assert EngineBundle.open(tmp_path / name).manifest.target.profile == name


class StopError(Exception):
    pass


def test_an_error_in_whoever_shows_progress_ends_the_build(builds: Builds, tmp_path: Path) -> None:
    plan = BuildPlan(checkpoint=str(builds.checkpoint("tiny")), profile=PROFILE, out=str(tmp_path / "out"))
    phases = []

    def progress(phase: str, done: int, total: int) -> None:
        phases.append(phase)
        if len(phases) > 5:
            raise StopError(phase)

    with pytest.raises(StopError):
        build(prepare(plan), progress)
    assert names(tmp_path) == []
    assert threading.active_count() == len(threading.enumerate())
    assert "compiler" not in [thread.name for thread in threading.enumerate()]


def test_a_compiler_that_still_runs_writes_into_nobody_elses_file(tmp_path: Path) -> None:
    """Its stream may be called after the file was closed, when the system has given the file's number to another."""
    with pytest.raises(KeyboardInterrupt), BundleWriter(tmp_path / "out") as bundle, bundle.create("plan") as plan:
        raise KeyboardInterrupt
    with (tmp_path / "other").open("wb", buffering=0):
        assert plan.sink(b"a piece of the plan") == 0
    assert (tmp_path / "other").read_bytes() == b""


def test_no_disk_space_is_told_before_the_compiler_starts(
    builds: Builds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = BuildPlan(checkpoint=str(builds.checkpoint("demo")), profile=PROFILE, out=str(tmp_path / "out"))
    monkeypatch.setattr("canvasrt.bundle.writer.free_bytes", lambda place: 1_000_000)
    monkeypatch.setattr(compiler, "load_compiler", None)
    with pytest.raises(CapacityError, match=r"bytes are needed and 1,000,000 are free on that disk"):
        build(prepare(plan), lambda *_: None)
    assert names(tmp_path) == []


def test_a_place_that_was_taken_meanwhile_stays(builds: Builds, tmp_path: Path) -> None:
    """Somebody else's bundle appears while this one is compiled: without --force it wins."""
    plan = BuildPlan(checkpoint=str(builds.checkpoint("tiny")), profile=PROFILE, out=str(tmp_path / "out"))
    other = builds.bundle("tiny", "l40s").path
    taken = threading.Event()

    def progress(phase: str, done: int, total: int) -> None:
        if not taken.is_set():
            taken.set()
            shutil.copytree(other, tmp_path / "out")

    with pytest.raises(BundleError, match="holds a bundle already"):
        build(prepare(plan), progress)
    assert names(tmp_path) == ["out"]
    assert EngineBundle.open(tmp_path / "out").manifest.target.profile == "l40s"

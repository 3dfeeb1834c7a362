"""A bundle appears whole or not at all: whatever is interrupted, dies or fills the disk, the old one stays."""

import contextlib
import errno
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import bundles
from bundles import names, plan_of
from canvasrt.bundle import staging
from canvasrt.bundle.reader import EngineBundle
from canvasrt.bundle.writer import BundleWriter
from canvasrt.errors import BundleError, CapacityError, CheckpointError

OLD, NEW = b"old" * 5_000, b"new" * 5_000
CALLS = ("open", "write", "fsync", "rename", "mkdir", "unlink", "rmdir", "close")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return bundles.checkpoint(tmp_path / "dg-nvfp4")


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / "engines").mkdir()
    return tmp_path / "engines" / "dg"


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is unplugged here, and waiting for disks would take most of the time."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(params=["exchange", "two renames"])
def swap(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of replacing a bundle: in one step, and where the file system has none."""
    if request.param == "two renames":
        monkeypatch.setattr(staging, "_exchange", lambda first, second: False)


@contextlib.contextmanager
def failing_at(number: int, failure: Callable[[], None]) -> Iterator[Callable[[], int]]:
    """Makes the n-th of the calls that change a disk fail; yields how many there were."""
    seen = 0
    originals = {name: getattr(os, name) for name in CALLS}

    def wrapped(name: str) -> Callable[..., object]:
        def call(*arguments: object, **keywords: object) -> object:
            nonlocal seen
            seen += 1
            if seen == number and name == "close":
                originals[name](*arguments, **keywords)  # a file is closed, whatever close says
            if seen == number:
                failure()
            return originals[name](*arguments, **keywords)

        return call

    for name in CALLS:
        setattr(os, name, wrapped(name))
    try:
        yield lambda: seen
    finally:
        for name, original in originals.items():
            setattr(os, name, original)


def remove(target: Path) -> None:
    if target.exists():
        shutil.rmtree(target)


def interrupt() -> None:
    raise KeyboardInterrupt


def no_space() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def build(target: Path, plan: bytes) -> None:
    with BundleWriter(target, force=True) as bundle:
        bundle.write("build.log", b"built")
        with bundle.create("text.engine") as file:
            file.sink(plan)
        bundle.finish(bundles.manifest(engines={"text": bundles.engine(tensors=bundles.tensors(1))}))


@pytest.mark.parametrize("before", [None, OLD])
@pytest.mark.parametrize("failure", [interrupt, no_space])
def test_a_failure_at_any_call_leaves_the_old_bundle_or_the_new_one(
    target: Path, swap: None, failure: Callable[[], None], before: bytes | None
) -> None:
    """And what it may leave beside it does not disturb the next build."""
    number, reached = 0, True
    while reached:
        number += 1
        remove(target)
        if before is not None:
            build(target, before)
        with failing_at(number, failure) as count:
            try:
                build(target, NEW)
            except (KeyboardInterrupt, CapacityError, BundleError, CheckpointError, OSError):
                assert count() >= number  # nothing else fails, whatever the failure before has left
        reached = count() >= number
        assert plan_of(target) in (before, NEW), number
    assert plan_of(target) == NEW
    assert number > 25
    assert names(target.parent) == ["dg"]


@pytest.mark.parametrize("before", [None, OLD])
def test_a_process_that_dies_at_any_call_leaves_the_old_bundle_or_the_new_one(
    target: Path, swap: None, before: bytes | None
) -> None:
    """Or, where names can't be swapped and just between two renames, the old one under a name that is told."""
    told, number, died = 0, 0, True
    while died:
        number += 1
        remove(target)
        if before is not None:
            build(target, before)
            assert names(target.parent) == ["dg"]
        child = os.fork()
        if child == 0:
            with failing_at(number, lambda: os._exit(9)):
                build(target, NEW)
                os._exit(0)
        died = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        if before is not None and not target.exists():
            told += 1
            with pytest.raises(
                BundleError, match=f"a build died while replacing it. The bundle before is {target}.rep"
            ):
                EngineBundle.open(target)
            assert plan_of(target.with_name("dg.replaced")) == before
        else:
            assert plan_of(target) in (before, NEW), number
    assert number > 25
    assert told <= 2
    assert plan_of(target) == NEW


@pytest.mark.parametrize("failure", [KeyboardInterrupt, ValueError, SystemExit])
def test_whatever_leaves_the_context_leaves_nothing(target: Path, source: Path, failure: type[BaseException]) -> None:
    bundles.write(target, source, plan=OLD)

    def fail() -> None:
        with BundleWriter(target, force=True) as bundle:
            bundle.write("build.log", b"half")
            raise failure

    with pytest.raises(failure):
        fail()
    with BundleWriter(target, force=True) as bundle:
        bundle.write("build.log", b"never finished")
    assert plan_of(target) == OLD
    assert names(target.parent) == ["dg"]


def test_an_error_while_a_plan_is_written_is_the_one_that_is_raised(target: Path) -> None:
    def fail() -> None:
        with BundleWriter(target) as bundle, bundle.create("text.engine") as file:
            file.write(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert names(target.parent) == []


def full_disk(monkeypatch: pytest.MonkeyPatch, number: int = errno.ENOSPC, after: int = 0) -> None:
    written = 0

    def write(handle: int, data: memoryview) -> int:
        nonlocal written
        if written + len(data) > after:
            raise OSError(number, os.strerror(number))
        written += len(data)
        return original(handle, data)

    original = os.write
    monkeypatch.setattr(os, "write", write)


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOSPC, "the disk is full: "),
        (errno.EDQUOT, "the quota is used up: "),
        (errno.EFBIG, "files may not grow larger here, at least 70,000 bytes more are needed. Raise the limit"),
    ],
)
def test_a_full_disk_says_where_and_how_much_is_lacking(
    target: Path, monkeypatch: pytest.MonkeyPatch, number: int, said: str
) -> None:
    full_disk(monkeypatch, number, after=30_000)

    def fill() -> None:
        with BundleWriter(target) as bundle, bundle.create("text.engine", expected_bytes=100_000) as file:
            file.write(bytes(30_000))
            file.write(bytes(30_000))

    with pytest.raises(CapacityError) as caught:
        fill()
    assert f"can't write {target}.partial/text.engine: {said}" in str(caught.value)
    assert "at least 70,000 bytes more are needed" in str(caught.value)
    assert names(target.parent) == []


def test_a_compilers_callback_never_raises_and_the_failure_is_not_lost(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    returned = []

    def compile_() -> None:
        with BundleWriter(target) as bundle, bundle.create("text.engine") as file:
            returned.extend(file.sink(data) for data in (bytes(10), bytes(10), b"", b"x"))
            raise RuntimeError("the compiler's own error, which says less")

    full_disk(monkeypatch, after=10)
    with pytest.raises(CapacityError, match="the disk is full"):
        compile_()
    assert returned == [10, 0, 0, 0]
    assert names(target.parent) == []


def test_after_a_failure_a_callback_writes_nothing_more(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    returned = []

    def compile_() -> None:
        with BundleWriter(target) as bundle, bundle.create("text.engine") as file:
            with monkeypatch.context() as patched:
                full_disk(patched)
                returned.append(file.sink(b"x"))
            returned.append(file.sink(b"y"))  # there is room again, and a hole in the file

    with pytest.raises(CapacityError):
        compile_()
    assert returned == [0, 0]


def test_an_interruption_during_a_callback_is_raised_after_it(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    returned = []

    def compile_() -> None:
        with BundleWriter(target) as bundle, bundle.create("text.engine") as file:
            returned.append(file.sink(b"x"))

    monkeypatch.setattr(os, "write", lambda handle, data: interrupt())
    with pytest.raises(KeyboardInterrupt):
        compile_()
    assert returned == [0]
    assert names(target.parent) == []


def test_a_file_that_failed_is_gone_and_can_be_written_again(
    target: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with BundleWriter(target) as bundle:
        for name in ("text.engine", "other.engine"):
            with monkeypatch.context() as patched:
                full_disk(patched)
                with pytest.raises(CapacityError):
                    bundle.write(name, b"half")
                with pytest.raises(CapacityError), bundle.create(f"{name}.2") as file:
                    file.sink(b"half")
        assert names(bundle.folder) == [".canvasrt-build"]
        bundle.write("text.engine", NEW)
        bundle.write("build.log", b"")
        assert list(bundle.finish(bundles.manifest()).files) == ["text.engine", "build.log"]
    assert plan_of(target) == NEW


def test_a_short_write_is_continued(target: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: original(handle, data[:777]))
    bundles.write(target, source)
    assert plan_of(target) == bundles.PLAN


def test_a_disk_that_is_too_small_is_told_before_anything_is_built(target: Path) -> None:
    with pytest.raises(CapacityError, match=r"1,000,000,000,000,000,000 bytes are needed and [0-9,]+ are free"):
        BundleWriter(target, expected_bytes=10**18).__enter__()
    assert names(target.parent) == []


def test_a_limit_of_the_shell_is_reported_and_leaves_nothing(target: Path, source: Path) -> None:
    code = f"import bundles, pathlib; bundles.write(pathlib.Path({str(target)!r}), pathlib.Path({str(source)!r}))"

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, preexec_fn=limit,
        cwd=Path(__file__).parent, timeout=60, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    assert done.returncode == 1
    assert "CapacityError: can't write" in done.stderr
    assert "text.engine: files may not grow larger here" in done.stderr
    assert names(target.parent) == []

"""Where a bundle may be put: one build at a time, nothing of somebody else's is touched, leftovers are cleaned up."""

import errno
import fcntl
import os
from pathlib import Path

import pytest

import bundles
from bundles import names, plan_of
from canvasrt.bundle import staging
from canvasrt.bundle.manifest import MANIFEST
from canvasrt.bundle.reader import EngineBundle
from canvasrt.bundle.writer import BundleWriter
from canvasrt.errors import BundleError, CheckpointError

OLD, NEW = b"old" * 5_000, b"new" * 5_000


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


def test_one_build_at_a_time(target: Path, source: Path) -> None:
    with BundleWriter(target):
        with pytest.raises(BundleError, match=f"another build of {target} is running: wait for it, or name another"):
            bundles.write(target, source)
        assert names(target.parent) == [".dg.lock", "dg.partial"]
        bundles.write(target.with_name("other"), source)
    bundles.write(target, source)
    assert names(target.parent) == ["dg", "other"]


def test_many_processes_that_build_the_same_make_one_whole_bundle(target: Path, source: Path) -> None:
    children = []
    for index in range(6):
        child = os.fork()
        if child == 0:
            done = 0
            for turn in range(30):
                try:
                    bundles.write(target, source, force=True, plan=bytes([index + 1, turn]) * 8_000)
                    done = 1
                except BundleError as error:
                    if "another build of" not in str(error):
                        os._exit(7)
                except BaseException:
                    os._exit(8)
            os._exit(done)
        children.append(child)
    codes = {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children}
    assert codes <= {0, 1}
    assert 1 in codes
    assert plan_of(target)
    assert names(target.parent) == ["dg"]


def test_a_lock_file_that_was_left_does_not_lock(target: Path, source: Path) -> None:
    (target.parent / ".dg.lock").touch()
    bundles.write(target, source)
    assert names(target.parent) == ["dg"]


def test_a_lock_that_its_holder_removed_meanwhile_is_none(
    target: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, left = fcntl.flock, [target.parent / ".dg.lock"]

    def flock(handle: int, operation: int) -> None:
        if left:
            left.pop().unlink()  # opened by us, and then the build that held it came to its end
        original(handle, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with BundleWriter(target), pytest.raises(BundleError, match="another build"):
        bundles.write(target, source)


def test_a_file_system_without_locks_is_refused(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(BundleError, match="has no locks, so two builds could mix: build on another one"):
        BundleWriter(target).__enter__()


@pytest.mark.parametrize("left", ["marked", "finished", "empty"])
def test_what_a_dead_build_left_is_replaced(target: Path, source: Path, left: str) -> None:
    partial = target.with_name("dg.partial")
    partial.mkdir()
    if left == "marked":
        (partial / ".canvasrt-build").touch()
        (partial / "text.engine").write_bytes(b"half")
        (partial / "unknown").mkdir()
    elif left == "finished":
        bundles.write(target.with_name("x"), source, plan=OLD)
        partial.rmdir()
        target.with_name("x").rename(partial)
    bundles.write(target, source)
    assert names(target.parent) == ["dg"]
    assert plan_of(target) == bundles.PLAN


@pytest.mark.parametrize("name", ["dg.partial", "dg.replaced"])
def test_what_is_not_of_a_build_is_left_alone(target: Path, source: Path, name: str) -> None:
    place = target.with_name(name)
    place.mkdir()
    (place / "thesis.txt").write_text("years of work")
    with pytest.raises(BundleError, match=f"{name} is in the way: .* Move it, or name another target"):
        bundles.write(target, source)
    assert (place / "thesis.txt").read_text() == "years of work"
    elsewhere = target.with_name("elsewhere")
    place.rename(elsewhere)
    place.symlink_to(elsewhere)
    with pytest.raises(BundleError, match="is in the way"):
        bundles.write(target, source)
    assert names(elsewhere) == ["thesis.txt"]


@pytest.mark.parametrize("name", ["dg.partial", "dg.replaced"])
def test_a_link_is_no_leftover_wherever_it_leads(target: Path, source: Path, name: str) -> None:
    other = target.with_name("other")
    bundles.write(other, source, plan=OLD)
    target.with_name(name).symlink_to(other)
    with pytest.raises(BundleError, match="is in the way"):
        bundles.write(target, source)
    assert plan_of(other) == OLD


def test_a_bundle_that_a_crash_moved_aside_is_put_back(target: Path, source: Path) -> None:
    bundles.write(target, source, plan=OLD)
    target.rename(target.with_name("dg.replaced"))
    with pytest.raises(BundleError, match="holds a bundle already: name another folder, or replace it with --force"):
        bundles.write(target, source)
    assert plan_of(target) == OLD
    assert names(target.parent) == ["dg"]


def test_only_a_bundle_is_replaced_and_only_when_asked(target: Path, source: Path) -> None:
    target.write_text("a file")
    with pytest.raises(BundleError, match="exists and is not a folder"):
        bundles.write(target, source, force=True)
    target.unlink()
    target.mkdir()
    bundles.write(target, source, plan=OLD)  # an empty folder is as good as none
    with pytest.raises(BundleError, match="holds a bundle already"):
        bundles.write(target, source)
    assert plan_of(target) == OLD
    (target / MANIFEST).write_text('{"name": "a web app"}')
    with pytest.raises(BundleError, match="holds other files and is not a bundle, so it is left alone"):
        bundles.write(target, source, force=True)
    assert "text.engine" in names(target)
    with pytest.raises(BundleError, match="/ can't be a bundle: name a folder in it"):
        BundleWriter(Path("/"))
    for name in ("x.partial", "x.replaced"):
        with pytest.raises(BundleError, match="are those of unfinished builds"):
            bundles.write(target.with_name(name), source)


def test_a_damaged_bundle_can_be_replaced(target: Path, source: Path, swap: None) -> None:
    bundles.write(target, source, plan=OLD)
    content = (target / MANIFEST).read_bytes()
    (target / MANIFEST).write_bytes(content[: len(content) // 2])
    bundles.write(target, source, force=True, plan=NEW)
    assert plan_of(target) == NEW


@pytest.mark.parametrize("force", [False, True])
def test_what_appears_at_the_target_during_a_build_is_not_overwritten(target: Path, force: bool) -> None:
    with BundleWriter(target, force=force) as bundle:
        for name in ("build.log", "text.engine"):
            bundle.write(name, b"content")
        target.mkdir()
        (target / "thesis.txt").write_text("years of work")
        with pytest.raises(BundleError, match="is not a bundle, so it is left alone"):
            bundle.finish(bundles.manifest())
    assert names(target) == ["thesis.txt"]
    assert names(target.parent) == ["dg"]


def test_a_link_to_a_bundle_stays_a_link(target: Path, source: Path, swap: None) -> None:
    bundles.write(target.with_name("v1"), source, plan=OLD)
    target.symlink_to("v1")
    bundles.write(target, source, force=True, plan=NEW)
    assert target.is_symlink()
    assert plan_of(target.with_name("v1")) == NEW
    assert names(target.parent) == ["dg", "v1"]


def test_readers_keep_the_plan_that_they_opened(target: Path, source: Path) -> None:
    bundles.write(target, source, plan=OLD)
    held = EngineBundle.open(target).engine("text")
    bundles.write(target, source, force=True, plan=NEW)
    assert held == OLD


def test_folders_that_can_not_be_written_are_named(tmp_path: Path, source: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BundleError, match=r"can't write .*/file/engines/dg: "):
        bundles.write(tmp_path / "file" / "engines" / "dg", source)


def test_a_checkpoint_file_that_is_not_there_is_named(target: Path, source: Path) -> None:
    (source / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config.json: can't be copied into the bundle: No such file"):
        bundles.write(target, source)
    assert names(target.parent) == []


def test_a_file_is_written_once_and_the_manifest_by_finish_alone(target: Path) -> None:
    with BundleWriter(target) as bundle:
        bundle.write("build.log", b"")
        for name in ("build.log", MANIFEST):
            with pytest.raises(ValueError, match="is written once"):
                bundle.write(name, b"")

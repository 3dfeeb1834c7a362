"""Which bundles go when another is built: never the wanted one, nobody's own, nor one that is being made."""

import os
from pathlib import Path

import pytest

from canvasrt.errors import InputError
from canvasrt.pipeline.lock import Lock, Waiting
from canvasrt.pipeline.receipt import receipt_file
from pipelines import Job
from planning import DEMO
from test_pipeline_stages import Copies, building


def built(tmp_path: Path, name: str, options: dict[str, int] | None = None, **changes: object) -> Job:
    """A run that wants the bundle ``name``, an hour later than the one before."""
    bundle = {"name": name, **(options or {})}
    wanted = building(tmp_path, Copies(), checkpoint={"source": str(DEMO)}, bundle=bundle, **changes)
    wanted.run()
    for receipt in (tmp_path / "v" / "engines").glob("*.receipt.json"):
        moment = receipt.stat().st_mtime - 3600
        os.utime(receipt, (moment, moment))
    return wanted


def there(tmp_path: Path) -> list[str]:
    return sorted(each.name for each in (tmp_path / "v" / "engines").iterdir() if each.is_dir())


def test_without_a_number_all_stay(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        built(tmp_path, name)
    assert there(tmp_path) == ["a", "b", "c"]


def test_the_one_that_nobody_has_asked_for_for_longest_goes_before_another_is_built(tmp_path: Path) -> None:
    built(tmp_path, "a")
    built(tmp_path, "b")
    built(tmp_path, "a", keep=2)  # went back: a is used again, and nothing is built
    assert there(tmp_path) == ["a", "b"]
    job = built(tmp_path, "c", keep=2)
    assert there(tmp_path) == ["a", "c"]
    assert "engines/b: nobody has asked for it for longest, and keep is 2" in job.log
    assert not receipt_file(tmp_path / "v" / "engines" / "b").exists()
    built(tmp_path, "d", keep=1)
    assert there(tmp_path) == ["d"]


def test_what_is_not_ours_or_is_being_made_stays(tmp_path: Path) -> None:
    for name in ("mine", "busy", "old"):
        built(tmp_path, name)
    engines = tmp_path / "v" / "engines"
    receipt_file(engines / "mine").unlink()  # as of a bundle that was copied there
    (engines / "notes").mkdir()
    with Lock(engines / "busy", Waiting(lambda line: None)):
        built(tmp_path, "new", keep=1)
        assert there(tmp_path) == ["busy", "mine", "new", "notes"]
    built(tmp_path, "newer", keep=1)
    assert there(tmp_path) == ["mine", "newer", "notes"]


def test_a_bundle_that_is_made_again_is_not_counted_twice(tmp_path: Path) -> None:
    built(tmp_path, "a")
    built(tmp_path, "b", keep=2)
    (tmp_path / "v" / "engines" / "b" / "manifest.json").unlink()
    built(tmp_path, "b", keep=2)
    assert there(tmp_path) == ["a", "b"]
    built(tmp_path, "b", {"context": 512}, keep=2)  # whole, and made from something else
    assert there(tmp_path) == ["a", "b"]


def test_a_number_is_one_or_more(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="keep"):
        built(tmp_path, "a", keep=0)

"""``canvasrt build`` as a user runs it: once and again, with build plans, and what it prints."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import tensorrt_rtx
import yaml

import canvasrt as package
from builds import Builds, canvasrt, listing, options, run_here
from canvasrt.bundle.reader import EngineBundle
from canvasrt.compile import job
from canvasrt.compile.buildplan import BuildPlan, load_plan
from canvasrt.compile.job import prepare
from canvasrt.profiles.profile import load_profile, profile_names
from planning import DEMO, ROOT, profile_file

PLANS = sorted((ROOT / "build" / "plans").glob("*.yaml"))
PROFILE = "rtx-5090"


@pytest.fixture
def tiny(builds: Builds, tmp_path: Path) -> tuple[Path, Path]:
    """A small checkpoint and a bundle of it, both of this test's own."""
    built = builds.bundle("tiny", PROFILE)
    shutil.copytree(built.checkpoint, tmp_path / "checkpoint")
    shutil.copytree(built.path, tmp_path / "engines" / "tiny")
    return tmp_path / "checkpoint", tmp_path / "engines" / "tiny"


def test_a_bundle_that_is_up_to_date_stays_as_it_is(tiny: tuple[Path, Path]) -> None:
    checkpoint, out = tiny
    before = listing(out.parent)
    arguments = options(checkpoint, PROFILE, out)
    code, printed, said = run_here("build", *arguments)
    assert (code, said) == (0, "")
    created = EngineBundle.open(out).manifest.created
    megabytes = (out / "text.engine").stat().st_size / 1e6
    assert printed.splitlines() == [
        f"{out}: rtx-5090 (12.0), tensorrt-rtx {tensorrt_rtx.__version__}, weights inside, plan {megabytes:.1f} MB; "
        f"up to date since {created} (--force builds again)",
        f"see what is in it: canvasrt inspect {out}",
    ]
    code, printed, said = run_here("build", *arguments, "--json")
    assert (code, said) == (0, "")
    assert json.loads(printed)["built"] is False
    assert listing(out.parent) == before


def test_force_builds_again_and_replaces_the_bundle(tiny: tuple[Path, Path]) -> None:
    checkpoint, out = tiny
    before = listing(out)
    identity = EngineBundle.open(out).manifest.build_id
    done = canvasrt("build", *options(checkpoint, PROFILE, out), "--force")
    assert done.returncode == 0, done.stderr
    after = listing(out)
    assert after.keys() == before.keys()
    assert all(after[name][:2] != before[name][:2] for name in before)
    assert EngineBundle.open(out).manifest.build_id == identity
    assert [file.name for file in out.parent.iterdir()] == ["tiny"]
    lines = done.stderr.splitlines()
    assert lines[0] == "weights: none  # as the checkpoint is stored"
    assert [line.partition(":")[0] for line in lines] == [
        "weights", "context", "slots", "canvases", "chunk", "K/V", "experts", "compiler", "GPU memory",
    ]  # fmt: skip
    assert "; built in " in done.stdout


def test_a_moved_checkpoint_and_another_place_are_the_same_build(tiny: tuple[Path, Path]) -> None:
    checkpoint, out = tiny
    moved = checkpoint.rename(checkpoint.with_name("moved"))
    elsewhere = out.rename(out.with_name("elsewhere"))
    assert "up to date" in run_here("build", *options(moved, PROFILE, elsewhere))[1]
    link = elsewhere.with_name("link")
    link.symlink_to(elsewhere)
    assert "up to date" in run_here("build", *options(moved, PROFILE, link))[1]
    assert link.is_symlink()


def test_another_build_in_the_same_place_is_refused_without_force(tiny: tuple[Path, Path]) -> None:
    checkpoint, out = tiny
    before = listing(out.parent)
    for more in (("--context", "200"), ("--moe", "dense"), ("--weights", "stripped")):
        code, printed, said = run_here("build", *options(checkpoint, PROFILE, out), *more)
        assert (code, printed) == (2, "")
        assert said.endswith(f"error: {out} holds a bundle already: name another folder, or replace it with --force\n")
    assert listing(out.parent) == before


def test_a_damaged_bundle_is_not_up_to_date(tiny: tuple[Path, Path]) -> None:
    checkpoint, out = tiny
    with (out / "embedding.bin").open("r+b") as stream:
        stream.write(b"\xff\xff")
    code, printed, said = run_here("build", *options(checkpoint, PROFILE, out))
    assert (code, printed) == (2, "")
    assert "--force" in said


def identity(checkpoint: Path, **changes: Any) -> str:
    plan = {"checkpoint": str(checkpoint), "profile": PROFILE, "out": "anywhere"} | changes
    return prepare(BuildPlan.model_validate(plan)).build_id


DIFFERENT: dict[str, dict[str, Any]] = {
    "weights": {"weights": "stripped"},
    "context": {"context": 200},
    "slots": {"slots": 3},
    "canvases": {"canvases": 1},
    "chunk": {"chunk": 100},
    "moe": {"moe": {"formulation": "dense"}},
    "capacity": {"moe": {"formulation": "capacity", "encoder_capacity": 5, "decoder_capacity": 5}},
    "profile": {"profile": "rtx-pro-6000"},
    "sm": {"profile": "l40s"},
}


@pytest.mark.parametrize("change", DIFFERENT)
def test_whatever_changes_the_result_makes_another_build(builds: Builds, change: str) -> None:
    checkpoint = builds.checkpoint("tiny")
    first = identity(checkpoint)
    assert identity(checkpoint) == first
    assert identity(checkpoint, out="elsewhere") == first
    assert identity(checkpoint, **DIFFERENT[change]) != first


def test_a_changed_byte_of_the_checkpoint_makes_another_build(builds: Builds, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(builds.checkpoint("tiny"), tmp_path / "checkpoint"))
    first = identity(checkpoint)
    content = bytearray((checkpoint / "model.safetensors").read_bytes())
    content[-3] ^= 1
    (checkpoint / "model.safetensors").write_bytes(content)
    assert identity(checkpoint) != first
    content[-3] ^= 1
    (checkpoint / "model.safetensors").write_bytes(content)
    assert identity(checkpoint) == first


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer.json", "generation_config.json", "config.json"])
def test_a_changed_file_that_the_bundle_takes_along_makes_another_build(tmp_path: Path, name: str) -> None:
    """They lie in the bundle: a build that does nothing would leave a server with the old ones."""
    checkpoint = Path(shutil.copytree(DEMO, tmp_path / "checkpoint"))
    first = identity(checkpoint)
    text = (checkpoint / name).read_text()
    changed = json.dumps(json.loads(text) | {"added": 1}) if name.endswith(".json") else f"{text}{{# new #}}"
    (checkpoint / name).write_text(changed)
    assert identity(checkpoint) != first


def test_a_changed_profile_file_makes_another_build(builds: Builds, tmp_path: Path) -> None:
    checkpoint = builds.checkpoint("tiny")
    file = profile_file(tmp_path)
    first = identity(checkpoint, profile=file)
    assert identity(checkpoint, profile=file) == first
    content = Path(file).read_text()
    Path(file).write_text(content.replace("a reason for slots", "another reason for slots"))
    assert identity(checkpoint, profile=file) != first
    Path(file).write_text(f"# a comment\n{content}")
    assert identity(checkpoint, profile=file) == first


def test_a_changed_recipe_file_makes_another_build(builds: Builds, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    content = (ROOT / "build" / "recipes" / "nvfp4.yaml").read_text()
    found = set()
    for text in (content, content.replace("  attention: nvfp4\n", "")):
        recipe.write_text(text)
        found.add(identity(builds.checkpoint("wide-1"), weights="stripped", recipe=str(recipe)))
    assert len(found) == 2


@pytest.mark.parametrize("which", ["canvasrt", "compiler"])
def test_another_version_makes_another_build(builds: Builds, monkeypatch: pytest.MonkeyPatch, which: str) -> None:
    checkpoint = builds.checkpoint("tiny")
    first = identity(checkpoint)
    if which == "canvasrt":
        assert job.__version__ == package.__version__
        monkeypatch.setattr(job, "__version__", "99.0")
    else:
        monkeypatch.setattr(tensorrt_rtx, "__version__", "99.0")
    assert identity(checkpoint) != first


@pytest.mark.parametrize("file", PLANS, ids=lambda file: file.stem)
def test_every_build_plan_loads_and_names_a_profile_and_a_recipe_of_it(file: Path) -> None:
    plan = load_plan(file)
    assert plan.profile in profile_names()
    assert load_profile(plan.profile).choices.compiler.value != "torch"
    assert plan.out.startswith("engines/")
    assert plan.weights == "inside"
    format_ = load_profile(plan.profile).choices.recipe.value.partition("-")[0]
    assert file.stem == f"{plan.profile}-{format_}" or plan.checkpoint == "examples/sudoku/checkpoint"


def test_there_is_a_build_plan_for_every_gpu() -> None:
    gpus = {name for name in profile_names() if load_profile(name).choices.compiler.value != "torch"}
    assert {load_plan(file).profile for file in PLANS} == gpus
    assert len({load_plan(file).out for file in PLANS}) == len(PLANS)


def test_a_build_plan_is_read_and_its_paths_are_those_of_the_working_directory(builds: Builds, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny").symlink_to(builds.checkpoint("tiny"))
    plan = {"checkpoint": "models/tiny", "profile": PROFILE, "out": "engines/tiny", "slots": 3, "context": 200}
    (tmp_path / "plans").mkdir()
    (tmp_path / "plans" / "tiny.yaml").write_text(yaml.safe_dump(plan))
    done = canvasrt("build", "plans/tiny.yaml", "--slots", "5", "--moe", "capacity:7:9", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["bundle"] == "engines/tiny"
    manifest = EngineBundle.open(tmp_path / "engines" / "tiny").manifest
    assert (manifest.shapes.slots, manifest.shapes.context) == (5, 200)
    assert manifest.options == {"context": 200, "slots": 5, "moe": "capacity:7:9"}
    assert manifest.plan["checkpoint"] == "models/tiny"
    assert (manifest.moe.encoder_capacity, manifest.moe.decoder_capacity) == (7, 9)
    seats = {name: each["seats"] for name, each in manifest.engines["text"].shape_ranges.items()}
    assert (seats["encoder"].opt, seats["decoder"].opt) == ((7,), (9,))
    reasons = {each.what: each.reason for each in manifest.reasons}
    assert (reasons["slots"], reasons["context"]) == ("--slots", "--context")
    before = listing(tmp_path / "engines")
    again = canvasrt("build", "plans/tiny.yaml", "--slots", "5", "--moe", "capacity:7:9", cwd=tmp_path)
    assert "up to date" in again.stdout
    assert listing(tmp_path / "engines") == before


def test_a_relative_path_and_a_home_are_what_the_shell_makes_of_them(tiny: tuple[Path, Path]) -> None:
    checkpoint, out = tiny
    arguments = options(Path(os.path.relpath(checkpoint, out.parent)), PROFILE, Path(out.name))
    done = canvasrt("build", *arguments, cwd=out.parent)
    assert done.returncode == 0, done.stderr
    assert "up to date" in done.stdout


def test_a_bundle_of_the_cli_can_be_inspected(builds: Builds) -> None:
    built = builds.bundle("tiny", PROFILE)
    done = canvasrt("inspect", built.path, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["manifest"] == built.open().manifest.model_dump(mode="json")
    assert "every byte verified" in canvasrt("inspect", built.path).stdout

"""``canvasrt quantize`` and ``verify --source`` as a user runs them, and what other commands do with the result."""

import contextlib
import json
import os
import pty
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from solve import CHECKPOINT, as_prompt, count_solved, held_out

from tiny import Dims, write

GRIDS = held_out(1)[0]


def canvasrt(
    *arguments: object, before: Callable[[], None] | None = None, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "canvasrt.cli.main", *(str(argument) for argument in arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout, preexec_fn=before)


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first lines of the demo checkpoint's held-out prompts."""
    file = tmp_path_factory.mktemp("few") / "evaluation.jsonl"
    file.write_text("".join((CHECKPOINT / "evaluation.jsonl").read_text().splitlines(keepends=True)[:8]))
    return file


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, few: Path) -> tuple[Path, dict[str, Any]]:
    """INT4 experts of the demo checkpoint, which take no calibration, and the report that was printed."""
    out = tmp_path_factory.mktemp("made") / "int4"
    done = canvasrt("quantize", CHECKPOINT, "--recipe", "int4-experts", "--out", out, "--evaluation", few, "--json")
    assert done.returncode == 0, done.stderr
    return out, json.loads(done.stdout)


def test_the_report_lies_beside_the_checkpoint_and_is_printed(made: tuple[Path, dict[str, Any]]) -> None:
    out, printed = made
    assert json.loads((out / "quality.json").read_text()) == printed
    assert printed["recipe"] == "int4-experts"
    assert printed["arithmetic"] == "exact"
    assert printed["prompts"] == 8
    assert 0 < printed["comparison"]["kl"] < 0.1
    assert 0.9 < printed["comparison"]["top1_agreement"] <= 1
    assert printed["bytes_on_disk"] < 0.7 * printed["source_bytes_on_disk"]
    assert "| solved |" in (out / "quality.md").read_text()


def test_reports_stand_side_by_side(made: tuple[Path, dict[str, Any]]) -> None:
    done = canvasrt("quantize", "--compare", made[0], made[0])
    assert done.returncode == 0
    assert done.stdout.count("int4") >= 2
    missing = canvasrt("quantize", "--compare", CHECKPOINT)
    assert missing.returncode == 2
    assert "no quality.json" in missing.stderr


def test_verify_says_how_far_a_quantized_checkpoint_is_from_its_source(
    made: tuple[Path, dict[str, Any]], few: Path
) -> None:
    arguments = ("verify", made[0], "--source", CHECKPOINT, "--evaluation", few, "--json")
    done = canvasrt(*arguments, "--max-kl", "0.1")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["comparison"] == made[1]["comparison"]
    failed = canvasrt(*arguments, "--max-kl", "1e-9")
    assert failed.returncode == 1
    assert "exceeds --max-kl" in failed.stderr


@pytest.mark.parametrize("exact", [(), ("--exact",)])
def test_a_quantized_checkpoint_answers(made: tuple[Path, dict[str, Any]], exact: tuple[str, ...]) -> None:
    done = canvasrt("generate", made[0], "--prompt", as_prompt(GRIDS), "--seed", "1", *exact)
    assert done.returncode == 0, done.stderr
    assert count_solved(done.stdout.rstrip("\n"), GRIDS) == 1


def test_its_speed_is_measured_and_not_against_transformers(made: tuple[Path, dict[str, Any]]) -> None:
    done = canvasrt("bench", made[0], "--requests", "2", "--json")
    assert json.loads(done.stdout)["runs"][0]["canvasrt"]["tokens_per_second"] > 0
    for command in (("bench", made[0], "--against", "transformers"), ("verify", made[0])):
        refused = canvasrt(*command)
        assert refused.returncode == 2
        assert "random experts and says nothing" in refused.stderr
        assert "Traceback" not in refused.stderr


def test_the_plan_says_what_is_needed_and_changes_nothing(tmp_path: Path) -> None:
    done = canvasrt("quantize", CHECKPOINT, "--recipe", "fp8", "--plan", "--out", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["fits"]
    assert 0 < plan["disk_bytes"] < plan["memory_bytes"]
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_is_a_clear_error_and_the_next_run_succeeds(tmp_path: Path) -> None:
    """Files may grow to 1 MB here, which stands for a full disk: the kernel refuses the write, not a patch."""

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))

    arguments = ("quantize", CHECKPOINT, "--recipe", "int4-experts", "--out", tmp_path / "out", "--no-report")
    failed = canvasrt(*arguments, before=small_files)
    assert failed.returncode == 3, failed.stderr
    assert "is full" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert not (tmp_path / "out").exists()
    assert canvasrt(*arguments).returncode == 0


def test_what_does_not_fit_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    """A vision tower of 1 TB, in a file that is one hole: the plan and the job read headers only."""
    folder = write(tmp_path / "model", Dims(expert_size=32))
    name, vision = "model.safetensors", "model.encoder.vision_tower.everything"
    with (folder / name).open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        rest = stream.read()
    header[vision] = {"dtype": "BF16", "shape": [5 * 10**11], "data_offsets": [len(rest), len(rest) + 10**12]}
    text = json.dumps(header).encode()
    with (folder / name).open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text + rest)
        stream.truncate(8 + len(text) + len(rest) + 10**12)
    prompts = tmp_path / "prompts.jsonl"  # token ids: this model has no tokenizer
    prompts.write_text('{"tokens": [5, 6, 7]}')
    arguments = ("quantize", folder, "--recipe", "fp8", "--calibration", prompts)
    for done in (canvasrt(*arguments, "--plan"), canvasrt(*arguments, "--out", tmp_path / "out")):
        assert done.returncode == 3, done.stderr
        assert "does not fit: cpu memory: " in done.stderr
        assert "disk at" in done.stderr
    assert not (tmp_path / "out.partial").exists()
    (folder / name).unlink()


def test_progress_is_shown_on_a_terminal_and_ctrl_c_ends_in_one_line(tmp_path: Path) -> None:
    """ModelOpt's chatter is silenced by redirecting standard error, which once silenced the bar too."""
    terminal, stderr = pty.openpty()
    command = [sys.executable, "-m", "canvasrt.cli.main", "quantize", str(CHECKPOINT), "--recipe", "fp8"]
    running = subprocess.Popen([*command, "--out", str(tmp_path / "out")], stderr=stderr, stdout=subprocess.DEVNULL)
    os.close(stderr)
    shown, stopped = "", False
    with contextlib.suppress(OSError):  # what a terminal gives at the end of its other side
        while more := os.read(terminal, 4096):
            shown += more.decode(errors="replace")
            if not stopped and re.search(r"calibrate.* [1-9]\d? of 32", shown):
                running.send_signal(signal.SIGINT)
                stopped = True
    os.close(terminal)
    assert running.wait(timeout=60) == 130
    assert stopped
    assert "was not made" in shown
    assert "Traceback" not in shown
    assert not (tmp_path / "out").exists()


ODD = Dims(expert_size=24)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--recipe", "nvfp5", "--out", "X"), ["no recipe is called 'nvfp5'", "nvfp4-experts"]),
        ((), ["--out DIR"]),
        (("--out", "X", "--device", "tpu"), ["device 'tpu' is unknown"]),
        (("--out", "X", "--calibration", "nowhere.jsonl"), ["nowhere.jsonl", "can't be read"]),
        (("another", "--out", "X"), ["one checkpoint at a time"]),
        (("--recipe", "AWQ.yaml", "--out", "X"), ["AWQ.yaml", "folded twice"]),
        (("--recipe", "UNKNOWN.yaml", "--out", "X"), ["unknown key colour"]),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(tmp_path: Path, arguments: tuple[str, ...], parts: list[str]) -> None:
    recipe = (Path(__file__).parents[1] / "build" / "recipes" / "fp8.yaml").read_text()
    (tmp_path / "AWQ.yaml").write_text(recipe.replace("algorithm: max", "algorithm: awq_lite"))
    (tmp_path / "UNKNOWN.yaml").write_text(recipe + "colour: red\n")
    before = sorted(tmp_path.iterdir())
    placed = [str(tmp_path / each) if each == "X" or each.endswith("l") else each for each in arguments]
    done = canvasrt("quantize", CHECKPOINT, *placed)
    assert done.returncode == 2
    assert [part for part in parts if part not in done.stderr] == [], done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(tmp_path.iterdir()) == before


def test_a_model_whose_widths_do_not_fit_is_refused_by_tensor(tmp_path: Path) -> None:
    done = canvasrt("quantize", write(tmp_path / "odd", ODD), "--out", tmp_path / "out")
    assert done.returncode == 2
    assert "experts.down_proj has 24 inputs, which is no multiple of 16" in done.stderr


@pytest.mark.parametrize("recipe", ["nvfp4-experts", "fp8"])
def test_the_demo_checkpoint_solves_as_many_puzzles_within_two_points(tmp_path: Path, recipe: str) -> None:
    held_out = tmp_path / "held-out.jsonl"  # every second one: all 192 take two minutes of a core
    held_out.write_text("".join((CHECKPOINT / "evaluation.jsonl").read_text().splitlines(keepends=True)[::2]))
    out = ("--out", tmp_path / recipe, "--evaluation", held_out)
    done = canvasrt("quantize", CHECKPOINT, "--recipe", recipe, *out, "--json", timeout=600)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["prompts"] == 96
    assert report["source_solved"] > 0.9
    assert report["solved"] >= report["source_solved"] - 0.02

"""The commands as a user runs them: what they print, how they fail, with which exit code."""

import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from solve import CHECKPOINT, as_prompt, count_solved, held_out

from canvasrt.cli.bench import WARM_UP, _warm_up
from tiny import write

ROOT = Path(__file__).parents[1]
GRIDS = held_out(1)[0]
PUZZLE = as_prompt(GRIDS)
TWO = held_out(1, 2)[0]


def canvasrt(*arguments: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "canvasrt.cli.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, input=text, check=False, timeout=300)


def answer(*arguments: str) -> dict[str, object]:
    done = canvasrt("generate", str(CHECKPOINT), "--json", *arguments)
    assert done.returncode == 0, done.stderr
    value = json.loads(done.stdout)
    assert isinstance(value, dict)
    return value


def test_generate_prints_the_answer_alone_on_standard_output() -> None:
    done = canvasrt("generate", str(CHECKPOINT), "--prompt", PUZZLE, "--seed", "1")
    assert done.returncode == 0
    assert count_solved(done.stdout.rstrip("\n"), GRIDS) == 1
    assert "tokens/s" in done.stderr
    assert "seed 1" in done.stderr


def test_generate_reads_standard_input() -> None:
    done = canvasrt("generate", str(CHECKPOINT), "--prompt", "-", "--seed", "1", text=PUZZLE)
    assert count_solved(done.stdout.rstrip("\n"), GRIDS) == 1


def test_generate_json_tells_what_a_program_needs() -> None:
    value = answer("--prompt", as_prompt(TWO), "--seed", "3")
    assert count_solved(str(value["text"]), TWO) == 2
    assert value["canvases"] == 2
    assert value["finish_reason"] == "stop"
    assert value["seed"] == 3
    assert value["prompt_tokens"] == 104
    assert value["output_tokens"] == 95
    assert answer("--prompt", as_prompt(TWO), "--seed", "3")["text"] == value["text"]


def test_options_reach_the_algorithm() -> None:
    cut = answer("--prompt", PUZZLE, "--seed", "1", "--max-tokens", "9")
    assert (cut["output_tokens"], cut["finish_reason"]) == (9, "length")
    stopped = answer("--prompt", PUZZLE, "--seed", "1", "--stop", "\n")
    assert "\n" not in str(stopped["text"])
    assert stopped["finish_reason"] == "stop"
    assert answer("--prompt", PUZZLE, "--seed", "1", "--steps", "2")["denoising_steps"] == 2
    with_token = answer("--prompt", PUZZLE, "--seed", "1", "--stop-token-id", "16")  # the line end
    assert with_token["output_tokens"] == 7


def test_several_prompts_are_answered_in_their_order() -> None:
    done = canvasrt("generate", str(CHECKPOINT), "--json", "-p", PUZZLE, "-p", "hello", "--seed", "1")
    first, second = (json.loads(line) for line in done.stdout.splitlines())
    assert count_solved(first["text"], GRIDS) == 1
    assert second["text"].startswith("Send six rows")


def test_live_shows_every_step_where_there_is_no_terminal() -> None:
    done = canvasrt("generate", str(CHECKPOINT), "-p", PUZZLE, "--seed", "1", "--live")
    steps = [line for line in done.stdout.splitlines() if " settled " in line]
    assert len(steps) >= 2
    assert "48/48 settled" in steps[-1]


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        (["generate", "nowhere", "-p", "x"], "nowhere", 2),
        (["generate", str(CHECKPOINT)], "no prompt", 2),
        (["generate", str(CHECKPOINT), "-p", "  "], "the prompt is empty", 2),
        (["generate", str(CHECKPOINT), "-p", "x", "--max-tokens", "0"], "max_tokens", 2),
        (["generate", str(CHECKPOINT), "-p", "x", "--max-tokens", "5000"], "leave room for 1008", 2),
        (["generate", str(CHECKPOINT), "-p", "x" * 2000], "leaves no room for a canvas", 2),
        (["generate", str(CHECKPOINT), "-p", "x", "--top-p", "1.5"], "top_p", 2),
        (["generate", str(CHECKPOINT), "-p", "x", "--t-min", "nan"], "t_min", 2),
        (["generate", str(CHECKPOINT), "-p", "x", "--t-min", "0.9", "--t-max", "0.1"], "t_max must be at least", 2),
        (["generate", str(CHECKPOINT), "-p", "x", "--seed", "-1"], "seed", 2),
        (["generate", str(CHECKPOINT), "-p", "x", "--stop-token-id", "112"], "outside the vocabulary of 112", 2),
        (["generate", str(CHECKPOINT), "-p", "x", "--context", "50"], "leaves no room", 2),
        (["generate", str(CHECKPOINT), "-p", "x", "--context", "4096"], "exceeds the 1024 positions", 3),
        (["generate", str(CHECKPOINT), "-p", "x", "--dtype", "fp8"], "dtype 'fp8' is unknown", 2),
        (["generate", str(CHECKPOINT), "-p", "x", "--live", "--json"], "choose one", 2),
        (["generate", str(CHECKPOINT), "-p", "a <|image|> of a grid"], "text only", 2),
        (["verify", "google/diffusiongemma-26B-A4B-it"], "hf download", 2),
        (["bench", str(CHECKPOINT), "--against", "vllm"], "transformers only", 2),
        (["bench", str(CHECKPOINT), "--concurrency", "two"], "--concurrency", 2),
        (["bench", str(CHECKPOINT), "--prompts", "nofile.jsonl"], "nofile.jsonl", 2),
    ],
)
def test_a_users_mistake_gets_one_line_and_an_exit_code(arguments: list[str], message: str, code: int) -> None:
    done = canvasrt(*arguments)
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_verify_passes_on_the_demo_checkpoint() -> None:
    done = canvasrt("verify", str(CHECKPOINT), "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["passed"] is True
    assert all(check["max_difference"] < 1e-4 for check in report["checks"])


def test_verify_fails_when_the_runtime_is_wrong(tmp_path: Path) -> None:
    """A runtime that mixes up the layer scalars: planted in a copy of the package that the command then imports."""
    import canvasrt

    package = Path(canvasrt.__file__).parent
    shutil.copytree(package, tmp_path / "canvasrt", ignore=shutil.ignore_patterns("__pycache__"))
    names = tmp_path / "canvasrt/network/names.py"
    correct = 'f"model.encoder.language_model.layers.{index}.layer_scalar"'
    assert correct in names.read_text()
    names.write_text(names.read_text().replace(correct, 'f"{DECODER}layers.{index}.layer_scalar"'))
    code = "import sys; sys.path.insert(0, sys.argv.pop(1)); from canvasrt.cli.main import main; main()"
    command = [sys.executable, "-c", code, str(tmp_path), "verify", str(CHECKPOINT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 1, done.stderr
    assert "DIFFERS from transformers" in done.stdout
    assert "FAILED" in done.stdout


def test_bench_against_transformers_reports_both_and_their_ratio() -> None:
    done = canvasrt(
        "bench", str(CHECKPOINT), "--against", "transformers", "--requests", "4", "--concurrency", "1,2", "--json"
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["ratio"] == min(run["ratio"] for run in report["runs"])
    for run in report["runs"]:
        assert run["ratio"] == run["canvasrt"]["tokens_per_second"] / run["transformers"]["tokens_per_second"]
        for side in ("canvasrt", "transformers"):
            assert run[side]["requests"] == 4
            assert run[side]["tokens"] > 100
            assert run[side]["tokens_per_forward"] > 1
            assert run[side]["time_to_first_canvas_ms"] > 0
        # Same prompts and rules: the number of tokens may differ by what sampling decides, not by how they are counted.
        assert run["canvasrt"]["tokens"] == pytest.approx(run["transformers"]["tokens"], rel=0.5)


def test_who_installs_torch_gets_what_the_cpu_runner_needs_and_who_lacks_it_a_sentence() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert [name for name, packages in extras.items() if "torch" in packages and "numba" not in packages] == []
    program = f"""import sys
sys.modules["numba"] = None
sys.argv = ["canvasrt", "generate", {str(CHECKPOINT)!r}, "--prompt", "hi"]
from canvasrt.cli.main import main
main()"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "error: this command needs numba: pip install 'canvasrt[torch]'\n" in done.stderr


def test_bench_warms_up_with_the_first_prompts_of_each_length() -> None:
    groups = [([np.zeros(length, np.int32) for length in lengths], []) for lengths in ([3], [3], [5, 3], [4], [5])]
    warm = [[len(tokens) for tokens in prompts] for prompts, _ in _warm_up(groups)]
    assert warm == [[3], [5, 3], [4]]
    assert len(_warm_up([([np.zeros(length, np.int32)], []) for length in range(1, 99)])) == WARM_UP


def test_bench_works_without_prompts_or_tokenizer(tmp_path: Path) -> None:
    done = canvasrt("bench", str(write(tmp_path)), "--requests", "2", "--max-tokens", "12")
    assert done.returncode == 0, done.stderr
    assert "tokens per forward" in done.stdout


def test_version() -> None:
    assert canvasrt("--version").stdout.startswith("canvasrt 0.")

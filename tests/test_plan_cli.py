"""`canvasrt plan` as a user runs it: what it prints, how it fails, with which exit code."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from canvasrt.inputs import input_folder
from canvasrt.profiles.profile import load_profile, profile_names
from planning import DEMO, GB, PUBLISHED, ROOT, profile_file, profile_text
from tiny import Dims, write


def plan(*arguments: object, checkpoint: object = PUBLISHED) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "canvasrt.cli.main", "plan", "--checkpoint", str(checkpoint)]
    command += [str(each) for each in arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, cwd=ROOT)


def planned(*arguments: object, checkpoint: object = PUBLISHED, code: int = 0) -> dict[str, Any]:
    done = plan(*arguments, "--json", checkpoint=checkpoint)
    assert done.returncode == code, done.stderr
    value = json.loads(done.stdout)
    assert isinstance(value, dict)
    return value


@pytest.fixture
def gpu(tmp_path: Path) -> str:
    return profile_file(tmp_path)


@pytest.mark.parametrize("name", [each for each in profile_names() if each != "cpu"])
def test_the_26b_is_planned_for_every_gpu_without_its_weights(name: str) -> None:
    done = plan("--profile", name)
    assert done.returncode == 0, done.stderr
    chosen = load_profile(name).choices
    for part in (
        "25.25 B parameters", f"({name})", chosen.recipe.value, "K/V of full layers", "driver and reserve",
        "in shared memory", "fits up to", f"{chosen.context.value:,}", "1,024", "4,096",
        "One denoising step", "Tokens per second", "at 15", "at 20", "committed", "Prefill of one chunk",
    ):  # fmt: skip
        assert part in done.stdout
    assert done.stderr == ""


def test_every_choice_comes_with_its_reason(gpu: str) -> None:
    output = plan("--profile", gpu, "--slots", "6").stdout
    for key in ("context", "canvases", "chunk", "kv_type", "moe", "compiler", "recipe"):
        assert f"a reason for {key}" in output
    assert "a reason for slots" not in output
    assert "--slots" in output


def test_the_shares_of_the_table_add_up(gpu: str) -> None:
    output = plan("--profile", gpu).stdout
    table = output.split("Memory of the GPU, planned")[1].split("Largest that fits")[0]
    rows = re.findall(r"^ (\S.*?)\s+([\d.]+)\s+([\d.]+)%\s*$", table, flags=re.MULTILINE)
    sizes, shares = ({name: float(row[index]) for name, *row in rows} for index in (0, 1))
    assert sizes.pop("total") + sizes.pop("free") == pytest.approx(34.0, abs=0.002)
    assert sum(shares.values()) - shares["total"] == pytest.approx(100, abs=0.3)
    assert sum(sizes.values()) == pytest.approx(34.0 * shares["total"] / 100, abs=0.03)


def test_json_holds_all_of_it(gpu: str) -> None:
    found = planned("--profile", gpu)
    assert (found["fits"], found["nearest"], found["advice"]) == (True, None, "")
    assert found["setting"] == {"slots": 4, "context": 32_768, "chunk": 512, "canvases": 2}
    assert found["parameters"] == 25_250_986_812
    budget = found["budget"]
    parts = [value for key, value in budget.items() if isinstance(value, int) and key != "total_bytes"]
    assert budget["total_bytes"] == sum(parts) + sum(budget["weights"].values())
    assert budget["activations_bytes"] == max(budget[name]["total_bytes"] for name in ("encoder", "decoder"))
    assert found["memory_bytes"] == 34 * GB
    assert found["largest"]["context"] > 32_768
    assert len(found["steps"]) == 12
    assert found["weights"] == "recipe nvfp4-experts"
    assert "recipe" in found["reasons"]["weights"]
    assert found["steps"][0]["parts"][0]["nbytes"] > 0


def test_options_replace_what_the_profile_chooses(gpu: str) -> None:
    options = {"slots": 3, "context": 8192, "chunk": 256, "canvases": 1}
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    found = planned("--profile", gpu, "--recipe", "nvfp4", *words)
    assert found["setting"] == options
    assert found["weights"] == "recipe nvfp4"
    assert {found["reasons"][name] for name in options} == {f"--{name}" for name in options}
    assert found["reasons"]["weights"] == "--recipe"


def test_numbers_that_belong_together_follow_each_other(gpu: str) -> None:
    more = planned("--profile", gpu, "--canvases", "5", "--recipe", "nvfp4", "--context", "8192")
    assert (more["setting"]["canvases"], more["setting"]["slots"]) == (5, 5)
    assert more["reasons"]["slots"] == "one for every canvas; the profile says 4"
    fewer = planned("--profile", gpu, "--slots", "1")
    assert (fewer["setting"]["canvases"], fewer["setting"]["slots"]) == (1, 1)
    assert fewer["reasons"]["canvases"] == "one for every slot; the profile says 2"
    short = planned("--profile", gpu, "--context", "512", "--chunk", "4096")
    assert short["setting"]["chunk"] == 512
    assert short["reasons"]["chunk"] == "the whole context; --chunk says 4,096"


def test_the_demo_is_planned_with_all_the_context_that_it_has(gpu: str) -> None:
    done = plan("--profile", gpu, checkpoint=DEMO)
    assert done.returncode == 0, done.stderr
    for part in (
        "2.24 M parameters",
        "as the checkpoint is stored",
        "all that the model has positions for; the profile",
    ):
        assert part in done.stdout
    found = planned("--profile", gpu, checkpoint=DEMO)
    assert found["setting"]["context"] == found["largest"]["context"] == 1024
    assert found["weights"] == "BF16"


def test_a_bf16_checkpoint_can_be_planned_as_it_would_be_quantized(gpu: str) -> None:
    found = planned("--profile", gpu, "--recipe", "fp8", checkpoint=DEMO)
    assert found["weights"] == "recipe fp8"
    assert "would have to be quantized" in found["reasons"]["weights"]
    assert set(found["budget"]["weights"]) == {"fp8", "plain"}


def test_what_does_not_fit_is_exit_code_3_and_its_advice_works(gpu: str) -> None:
    asked = ("--profile", gpu, "--context", "262144", "--slots", "8")
    done = plan(*asked)
    assert done.returncode == 3
    assert "lacking" in done.stdout
    assert "error: test-gpu has 34.00 GB and this needs " in done.stderr
    advised = re.search(r"It fits with (--context \d+) \(", done.stderr)
    assert advised is not None, done.stderr
    assert plan(*asked, *shlex.split(advised[1])).returncode == 0
    refused = planned(*asked, code=3)
    assert not refused["fits"]
    assert f"--context {refused['nearest']['context']}" in advised[1]
    assert refused["advice"] in done.stderr


def test_other_ways_out_that_are_named_work_too() -> None:
    done = plan("--profile", "rtx-5090", "--recipe", "none")
    assert done.returncode == 3
    assert "--context" not in done.stderr
    for option in ("--recipe", "--profile"):
        advised = re.search(rf"with {option} ([\w-]+)", done.stderr)
        assert advised is not None, done.stderr
        changed = {"--profile": "rtx-5090", "--recipe": "none"} | {option: advised[1]}
        setting = planned("--profile", "rtx-5090", "--recipe", "none", code=3)["setting"]
        words = [word for name, value in setting.items() for word in (f"--{name}", value)]
        assert plan(*(word for pair in changed.items() for word in pair), *words).returncode == 0


def test_the_cpu_profile_gets_a_clear_answer() -> None:
    done = plan("--profile", "cpu", checkpoint=DEMO)
    assert done.returncode == 0, done.stderr
    for part in ("compiles nothing", "torch runtime", "canvasrt generate", "K/V of full layers", "total"):
        assert part in done.stdout
    found = planned("--profile", "cpu", checkpoint=DEMO)
    assert found["fits"] is None
    assert found["budget"]["weight_bytes"] == 4 * 2_239_292


@pytest.mark.parametrize(
    ("arguments", "code", "parts"),
    [
        (("--profile", "rtx-9090"), 2, ["no GPU profile is called 'rtx-9090'", "rtx-5090", ".yaml"]),
        (("--profile", "nowhere.yaml"), 2, ["nowhere.yaml", "can't be read"]),
        (("--profile", "GPU", "--recipe", "nvfp5"), 2, ["no recipe is called 'nvfp5'", "nvfp4-experts"]),
        (("--profile", "GPU", "--context", "300000"), 3, ["exceeds the 262144 positions", "at most 262144"]),
        (("--profile", "GPU", "--context", "300"), 2, ["no room for a prompt", "at least 512"]),
        (("--profile", "GPU", "--slots", "2", "--canvases", "3"), 2, ["canvases 3 exceeds slots 2"]),
        (("--profile", "GPU", "--slots", "0"), 2, ["--slots"]),
        (("--profile", "rtx-4090", "--recipe", "nvfp4"), 2, ["can't compute with the NVFP4", "--recipe int4-experts"]),
        ((), 2, ["--profile"]),
    ],
    ids=str,
)
def test_mistakes_are_one_message(gpu: str, arguments: tuple[str, ...], code: int, parts: list[str]) -> None:
    done = plan(*(gpu if each == "GPU" else each for each in arguments))
    assert done.returncode == code, done.stderr
    assert [part for part in parts if part not in done.stderr] == [], done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_missing_checkpoint_is_named(gpu: str, tmp_path: Path) -> None:
    done = plan("--profile", gpu, checkpoint=tmp_path / "nowhere")
    assert done.returncode == 2
    assert "nowhere: no such folder" in done.stderr


def test_a_model_whose_widths_the_recipe_does_not_divide_is_named(gpu: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "odd", Dims(expert_size=24, context=512))
    done = plan("--profile", gpu, "--recipe", "nvfp4-experts", checkpoint=folder)
    assert done.returncode == 2
    assert "experts.down_proj has 24 inputs, which is no multiple of 16" in done.stderr


def test_a_quantized_checkpoint_takes_no_other_recipe(gpu: str, tmp_path: Path) -> None:
    """Its config.json says that it is quantized; the tensors are plain, as ModelOpt leaves those it does not touch."""
    folder = tmp_path / "quantized"
    shutil.copytree(DEMO, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "FP8"}
    (folder / "config.json").write_text(json.dumps(config))
    done = plan("--profile", gpu, "--recipe", "nvfp4", checkpoint=folder)
    assert done.returncode == 2
    assert "is quantized already (FP8 (modelopt)): leave --recipe out" in done.stderr
    assert planned("--profile", gpu, checkpoint=folder)["weights"] == "FP8 (modelopt)"


def test_a_profile_without_memory_is_refused_by_name(tmp_path: Path) -> None:
    done = plan("--profile", profile_file(tmp_path, memory_gb=None))
    assert done.returncode == 2
    assert "test-gpu states no memory_gb" in done.stderr


def test_a_profile_with_an_unknown_key_is_refused(tmp_path: Path) -> None:
    content = profile_text()
    content["colour"] = "green"
    (tmp_path / "odd.yaml").write_text(yaml.safe_dump(content))
    done = plan("--profile", tmp_path / "odd.yaml")
    assert done.returncode == 2
    assert "unknown key colour" in done.stderr


def test_a_recipe_of_ones_own_is_planned(gpu: str, tmp_path: Path) -> None:
    recipe = yaml.safe_load((input_folder("recipes") / "nvfp4.yaml").read_text())
    recipe |= {"name": "mine", "tensors": {"mlp": "nvfp4"}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe))
    found = planned("--profile", gpu, "--recipe", tmp_path / "mine.yaml", code=3)
    assert found["weights"] == "recipe mine"
    assert found["budget"]["weights"]["nvfp4"] == 30 * (3 * 2112 * 2816 * 9 // 16 + 4 * (2 * 2112 + 2816))


def test_planning_needs_no_torch(gpu: str) -> None:
    script = (
        "import sys; sys.modules['torch'] = None\n"
        "from canvasrt.cli import plan\n"
        f"plan.plan(plan.Path({str(PUBLISHED)!r}), {gpu!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "One denoising step" in done.stdout


def test_the_example_of_the_page_is_what_the_command_prints() -> None:
    page = (ROOT / "docs" / "planning.md").read_text(encoding="utf-8")
    command = page.split("```sh\ncanvasrt plan --checkpoint ")[1].split("```")[0].replace("\\\n", " ")
    checkpoint, *words = shlex.split(command)
    output = {line.rstrip() for line in plan(*words, checkpoint=checkpoint).stdout.splitlines()}
    shown = [line for line in page.split("```text\n")[1].split("```")[0].splitlines() if line]
    assert len(shown) > 15
    assert [line for line in shown if line not in output] == []

"""``canvasrt profiles``: what it prints, what a program reads from it, how it fails."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from solve import CHECKPOINT
from typer.testing import CliRunner

from canvasrt.cli import profiles as command
from canvasrt.errors import CheckpointError, InputError
from canvasrt.profiles import detect
from canvasrt.profiles.profile import load_profile, profile_names

PUBLISHED = Path(__file__).parent / "fixtures" / "diffusiongemma-26b-a4b"  # config.json of the 26B, without weights
PAGE = Path(__file__).parents[1] / "docs" / "profiles.md"
STATION = "NVIDIA RTX PRO 2000 Blackwell, 12.0, 16303, 580.1\nNVIDIA GB300, 10.3, 256703, 580.1\n"
A100 = "NVIDIA A100-SXM4-80GB, 8.0, 81920, 550.54.15\n"


def run(*arguments: object, code: int = 0) -> Any:
    result = CliRunner().invoke(command.app, [str(each) for each in arguments])
    assert result.exit_code == code, result.output
    return result


def refused(kind: type[Exception], *arguments: object) -> str:
    """What the command line prints behind "error: "."""
    result = CliRunner().invoke(command.app, [str(each) for each in arguments])
    assert isinstance(result.exception, kind), result.output
    assert result.stdout == ""
    return str(result.exception)


def changed(folder: Path, **dimensions: int) -> Path:
    """A folder with the 26B model's config.json, some dimensions changed, and no weights."""
    content = json.loads((PUBLISHED / "config.json").read_text())
    content["text_config"] |= dimensions
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def test_the_list_has_a_row_for_every_profile() -> None:
    head, *rows = run().stdout.splitlines()
    assert [row.split()[0] for row in rows] == profile_names()
    assert head.split()[:3] == ["name", "GPU", "SM"]
    row = next(row for row in rows if row.startswith("rtx-4090"))
    for part in (
        "GeForce RTX 4090 24 GB",
        "8.9",
        "25.8 GB",
        "1,008 GB/s",
        "tensorrt-rtx",
        "int4-experts",
        "capacity 64/64",
    ):
        assert part in row
    assert row.endswith("2 x 32,768       1")
    columns = {head.index(name) for name in ("GPU", "memory", "compiler", "canvases")}
    assert all(row[column - 1] == " " and row[column] != " " for row in rows for column in columns)


def test_the_list_for_programs_is_the_profiles_themselves() -> None:
    values = json.loads(run("--json").stdout)
    assert [value["name"] for value in values] == profile_names()
    h100 = next(value for value in values if value["name"] == "h100")
    assert h100["sm"] == 90
    assert h100["facts"]["memory_gb"] == {"value": 85.521, "source": h100["facts"]["memory_gb"]["source"]}
    assert h100["choices"]["slots"]["value"] == load_profile("h100").choices.slots.value
    assert "fit" not in h100


def test_a_config_alone_is_planned_with_each_profiles_recipe() -> None:
    result = run("--checkpoint", PUBLISHED)
    head, *rows = result.stdout.splitlines()
    assert head.endswith("fits")
    assert [row.split("  ")[-1].split(":")[0].strip() for row in rows] == [
        "at start" if name == "cpu" else "yes" for name in profile_names()
    ]
    assert "of 25.8 GB" in next(row for row in rows if row.startswith("rtx-4090"))
    assert result.stderr == ""


def test_what_does_not_fit_is_said_with_a_way_out(tmp_path: Path) -> None:
    """Twice as many experts: 31 GB in NVFP4."""
    config = changed(tmp_path, num_experts=256)
    result = run("--checkpoint", config)
    rows = {row.split()[0]: row for row in result.stdout.splitlines()}
    assert "no: " in rows["rtx-5090"]
    assert "yes: " in rows["b200"]
    advice = next(line for line in result.stderr.splitlines() if line.startswith("rtx-5090: "))
    assert "--profile" in advice
    fit = {value["name"]: value["fit"] for value in json.loads(run("--checkpoint", config, "--json").stdout)}
    assert fit["rtx-5090"]["ok"] is False
    assert fit["rtx-5090"]["needed_bytes"] > fit["rtx-5090"]["free_bytes"]
    assert fit["cpu"] == fit["cpu"] | {"ok": True, "needed_bytes": None}


def test_a_recipe_that_the_model_does_not_divide_into_is_a_no_for_that_profile(tmp_path: Path) -> None:
    config = changed(tmp_path, moe_intermediate_size=712)  # no multiple of 16 or 64
    fit = {value["name"]: value["fit"] for value in json.loads(run("--checkpoint", config, "--json").stdout)}
    assert fit["h100"]["ok"]
    assert not fit["rtx-4090"]["ok"]
    assert "712 inputs, which is no multiple of 64" in fit["rtx-4090"]["advice"]


def test_a_checkpoint_is_planned_as_it_is_stored() -> None:
    rows = run("--checkpoint", CHECKPOINT).stdout.splitlines()[1:]
    assert all("yes: " in row or "at start" in row for row in rows)


def test_a_folder_without_a_model_is_an_error(tmp_path: Path) -> None:
    assert str(tmp_path) in refused(CheckpointError, "--checkpoint", tmp_path)


@pytest.mark.parametrize("name", profile_names())
def test_show_prints_every_source_and_every_reason(name: str) -> None:
    text = run("show", name).stdout
    profile = load_profile(name)
    words = " ".join(text.split())
    for section in (profile.facts, profile.choices):
        for key in type(section).model_fields:
            entry = getattr(section, key)
            said = getattr(entry, "source", None) or getattr(entry, "reason", "")
            assert " ".join(said.split()) in words
    assert text.startswith(f"{name}: {profile.title}\n")
    assert all(len(line) <= 100 or "https://" in line for line in text.splitlines())


def test_show_says_values_in_their_units() -> None:
    text = run("show", "h100").stdout
    for part in (
        "memory              85.521 GB", "bandwidth           3,350 GB/s", "FP4 none", "TFLOP/s, dense",
        "experts             capacity 256/256", "context             65,536 tokens per slot",
    ):  # fmt: skip
        assert part in text
    assert "shared with the CPU" not in text
    assert "shared with the CPU" in run("show", "dgx-spark").stdout
    assert "node label          none" in run("show", "cpu").stdout


def test_show_for_programs_and_of_a_file_of_ones_own(tmp_path: Path) -> None:
    value = json.loads(run("show", "l40s", "--json").stdout)
    file = tmp_path / "mine.yaml"
    file.write_text(
        yaml.safe_dump({key: value[key] for key in ("name", "title", "facts", "choices")} | {"name": "mine"})
    )
    assert run("show", file).stdout.startswith("mine: NVIDIA L40S")
    assert value["sm"] == 89


def test_mistakes_are_told(tmp_path: Path) -> None:
    assert "no GPU profile is called 'a100'" in refused(InputError, "show", "a100")
    assert "can't be read" in refused(InputError, "show", tmp_path / "none.yaml")
    assert "put options behind the command: canvasrt profiles detect" in refused(InputError, "--json", "detect")
    assert "No such command" in run("shwo", code=2).output


def test_detect_lists_every_gpu_with_what_is_known_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detect, "ask", lambda: STATION)
    lines = run("detect").stdout.splitlines()
    first = "GPU 0: NVIDIA RTX PRO 2000 Blackwell (SM 12.0, 17.1 GB, driver 580.1): rtx-5090, as a guess"
    assert lines[0] == first
    assert lines[1].startswith("  NVIDIA RTX PRO 2000 Blackwell is the product of no profile")
    assert lines[-1] == "GPU 1: NVIDIA GB300 (SM 10.3, 269.2 GB, driver 580.1): dgx-station"
    values = json.loads(run("detect", "--json").stdout)
    assert [(value["profile"], value["certainty"]) for value in values] == [
        ("rtx-5090", "guess"),
        ("dgx-station", "product"),
    ]
    assert values[1]["gpu"]["memory_bytes"] == 256703 * 2**20


def test_detect_works_where_the_driver_reports_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detect, "ask", lambda: "NVIDIA GB10, 12.1, [N/A], [N/A]\n")
    assert run("detect").stdout == "GPU 0: NVIDIA GB10 (SM 12.1, memory not reported): dgx-spark\n"


def test_detect_fails_where_no_gpu_has_a_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detect, "ask", lambda: A100)
    assert "no profile; nearest is l40s" in run("detect", code=1).stdout
    assert json.loads(run("detect", "--json", code=1).stdout)[0]["profile"] is None
    monkeypatch.setattr(detect, "ask", lambda: A100 + STATION)
    run("detect")  # one is enough


def test_detect_without_a_driver_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask() -> str:
        return original(("no-such-nvidia-smi",))

    original = detect.ask
    monkeypatch.setattr(detect, "ask", ask)
    assert "install the NVIDIA driver" in refused(InputError, "detect")


def test_the_table_of_the_page_is_current() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert command.with_table(text) == text
    assert f"\n{command.markdown_table()}\n" in text
    assert command.markdown_table().count("\n") == len(profile_names()) + 1


@pytest.mark.parametrize(
    "text", ["", command.BEGIN, f"{command.END}\n{command.BEGIN}", f"{command.BEGIN * 2}{command.END}"]
)
def test_a_page_without_its_markers_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="the page needs the lines"):
        command.with_table(text)


def test_an_old_table_is_renewed_and_the_rest_of_the_page_kept() -> None:
    page = f"before\n\n{command.BEGIN}\nold\n{command.END}\n\nafter\n"
    renewed = command.with_table(page)
    assert renewed.startswith(f"before\n\n{command.BEGIN}\n")
    assert renewed.endswith(f"{command.END}\n\nafter\n")
    assert "old" not in renewed
    assert command.with_table(renewed) == renewed

"""Profiles: every shipped file says where its facts come from, and figures that follow; wrong files are refused."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from canvasrt.compile.budget import Fit, fits
from canvasrt.compile.roofline import computed_in
from canvasrt.compile.sizes import bytes_by_format, sizes
from canvasrt.compile.source import ModelSource
from canvasrt.compile.vram import kv_per_token
from canvasrt.errors import InputError
from canvasrt.profiles.profile import Choice, Fact, GpuProfile, load_profile, profile_names
from canvasrt.quantize.recipe import load_recipe
from canvasrt.spec import ModelSpec

FOLDER = Path(__file__).parents[1] / "src" / "canvasrt" / "profiles"
SHIPPED = (
    "b200", "cpu", "dgx-spark", "dgx-station", "h100", "h200", "l40s", "rtx-4090", "rtx-5090", "rtx-pro-6000",
)  # fmt: skip
GPUS = tuple(name for name in SHIPPED if name != "cpu")
CAPABILITIES = {
    "Ada Lovelace": {"8.9"}, "Hopper": {"9.0"}, "Blackwell": {"10.0", "12.0", "12.1"}, "Blackwell Ultra": {"10.3"},
}  # fmt: skip
TENSORRT_RTX = {75, 80, 86, 89, 120, 121}  # SMs that it builds for
HEADROOM = 4  # capacity of the experts in multiples of their mean load
REALISTIC = 0.6  # of a GPU's rate, in the reasons
VISION_GB = 1.5  # what a profile leaves for the vision engine and the unknown

PUBLISHED = Path(__file__).parent / "fixtures" / "diffusiongemma-26b-a4b"  # config.json of the 26B, without weights
SPEC = ModelSpec.load(PUBLISHED)
REMOVED = object()


def model(profile: GpuProfile) -> ModelSource:
    """The 26B model in the format of a profile's recipe."""
    return ModelSource.open(PUBLISHED, profile.choices.recipe.value)


def planned(profile: GpuProfile) -> Fit:
    return fits(model(profile), profile)


def entries(section: Any) -> list[tuple[str, Any]]:
    return [(key, getattr(section, key)) for key in type(section).model_fields]


def changed(path: str, value: Any) -> str:
    """The text of a profile, with the entry at a dotted path set, added or, for REMOVED, taken away."""
    content = yaml.safe_load((FOLDER / "l40s.yaml").read_text(encoding="utf-8"))
    *sections, last = path.split(".")
    section = content
    for each in sections:
        section = section[each]
    if value is REMOVED:
        del section[last]
    else:
        section[last] = value
    return yaml.safe_dump(content)


def refusal(folder: Path, text: str) -> str:
    """The message, which always names the file."""
    file = folder / "mine.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(InputError) as caught:
        load_profile(str(file))
    message = str(caught.value)
    assert message.startswith(f"profile {file}")
    assert "\n" not in message
    assert not [word for word in ("pydantic", "Value error", "validation error", "[key]") if word in message]
    return message


def test_the_shipped_profiles_are_those_of_the_folder() -> None:
    assert tuple(profile_names()) == SHIPPED
    assert sorted(file.stem for file in FOLDER.glob("*.y*ml")) == list(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_profile_loads_by_its_name_and_by_its_file(name: str) -> None:
    profile = load_profile(name)
    assert profile.name == name
    assert profile == load_profile(str(FOLDER / f"{name}.yaml"))
    text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    assert [line for line in text.splitlines() if len(line) > 120 and "https://" not in line] == []


@pytest.mark.parametrize("name", GPUS)
def test_every_fact_of_a_gpu_has_an_address_or_a_derivation(name: str) -> None:
    facts = [(key, fact) for key, fact in entries(load_profile(name).facts) if key != "memory_is_shared"]
    assert [key for key, fact in facts if not isinstance(fact, Fact)] == []
    assert [key for key, fact in facts if not re.search(r"https://\S+|^arithmetic: ", fact.source)] == []


@pytest.mark.parametrize("name", SHIPPED)
def test_every_choice_has_a_reason_of_its_own(name: str) -> None:
    choices = entries(load_profile(name).choices)
    assert [key for key, choice in choices if not isinstance(choice, Choice) or len(choice.reason) < 20] == []
    assert len({choice.reason for _, choice in choices}) == len(choices)


@pytest.mark.parametrize("name", GPUS)
def test_the_compute_capability_is_of_the_architecture_and_the_compiler_targets_it(name: str) -> None:
    profile = load_profile(name)
    capability = profile.facts.compute_capability
    assert capability is not None
    assert capability.value in CAPABILITIES[profile.facts.architecture.value]
    assert profile.sm is not None
    assert (profile.choices.compiler.value == "tensorrt-rtx") == (profile.sm in TENSORRT_RTX)
    assert profile.choices.compiler.value != "torch"
    assert f"SM {capability.value}" in profile.choices.compiler.reason


@pytest.mark.parametrize("name", GPUS)
def test_rates_are_there_for_the_tensor_cores_that_the_gpu_has(name: str) -> None:
    profile = load_profile(name)
    assert profile.facts.tflops is not None
    rates = profile.facts.tflops.value
    assert (rates.fp4 is not None) == profile.runs("nvfp4")
    assert (rates.fp8 is not None) == profile.runs("fp8")
    assert 1.9 < (rates.fp8 or 0) / rates.bf16 < 2.1
    assert rates.fp4 is None or rates.fp4 > 1.9 * (rates.fp8 or 0)


@pytest.mark.parametrize("name", GPUS)
def test_memory_is_what_the_driver_reports(name: str) -> None:
    memory = load_profile(name).facts.memory_gb
    assert memory is not None
    mib = re.search(r"nvidia-smi says (\d+) MiB", memory.source)
    nbytes = re.search(r"^(\d+) bytes", memory.source)
    reported = int(mib[1]) * 2**20 if mib else int(nbytes[1]) if nbytes else 0
    assert memory.value == round(reported / 1e9, 3)


def test_a_product_belongs_to_one_profile() -> None:
    names = [name for profile in GPUS for name in load_profile(profile).facts.product_names.value]
    assert len(names) == len(set(names)) == 12
    assert all(re.fullmatch(r"NVIDIA-[A-Za-z0-9-]+", name) for name in names)


@pytest.mark.parametrize("name", SHIPPED)
def test_the_recipe_exists_and_the_gpu_runs_its_format(name: str) -> None:
    profile = load_profile(name)
    recipe = profile.choices.recipe.value
    assert recipe == "none" or profile.runs(load_recipe(recipe).format.weights)
    assert (recipe == "none") == (name == "cpu")


@pytest.mark.parametrize("name", GPUS)
def test_the_capacity_of_the_experts_is_four_times_their_mean_load(name: str) -> None:
    """Mean load: tokens x 8 chosen / 128 experts."""
    choices = load_profile(name).choices
    moe = choices.moe.value
    assert moe.formulation == "capacity"
    tokens = (choices.chunk.value, choices.canvases.value * SPEC.canvas_length)
    expected = tuple(HEADROOM * each * SPEC.experts_per_token // SPEC.experts for each in tokens)
    assert (moe.encoder_capacity, moe.decoder_capacity) == expected


@pytest.mark.parametrize("name", GPUS)
def test_the_times_in_the_reason_follow_from_the_facts(name: str) -> None:
    """Experts of a full decoder call, and weights (the embedding twice) read once."""
    profile = load_profile(name)
    source, facts, moe = model(profile), profile.facts, profile.choices.moe
    assert facts.tflops is not None
    assert facts.bandwidth_gb_s is not None
    assert moe.value.decoder_capacity is not None
    experts = next((form, size) for (part, form), size in sizes(source).items() if part == "experts")
    rate = REALISTIC * getattr(facts.tflops.value, computed_in(experts[0]))
    per_token = 2 * experts[1].elements / 1e9 / rate  # ms
    embedding = SPEC.vocab_size * SPEC.hidden_size * 2
    reading = (sum(bytes_by_format(source).values()) + embedding) / 1e6 / facts.bandwidth_gb_s.value
    dense = per_token * profile.choices.canvases.value * SPEC.canvas_length
    for ms in (per_token * moe.value.decoder_capacity, reading, dense):
        assert f"{ms:.1f} ms" in moe.reason


@pytest.mark.parametrize("name", GPUS)
def test_the_26b_model_fits_its_gpu_and_leaves_room_for_vision(name: str) -> None:
    profile = load_profile(name)
    fit = planned(profile)
    assert fit.ok, fit.advice
    assert fit.needed_bytes is not None
    assert fit.free_bytes is not None
    assert fit.free_bytes - fit.needed_bytes > VISION_GB * 1e9
    stated = re.search(r"about (\d+) of ([0-9.]+) GB", profile.choices.context.reason)
    assert stated is not None
    assert abs(int(stated[1]) - fit.needed_bytes / 1e9) < 1.5
    assert float(stated[2]) == round(fit.free_bytes / 1e9, 1)


@pytest.mark.parametrize("name", GPUS)
def test_the_memory_of_a_slot_is_stated_rightly(name: str) -> None:
    choices = load_profile(name).choices
    sliding = SPEC.sliding_window - 1 + max(choices.chunk.value, SPEC.canvas_length) + SPEC.canvas_length
    per_slot = choices.context.value * kv_per_token(SPEC, "full") + sliding * kv_per_token(SPEC, "sliding")
    assert f"{per_slot / 1e9:.2f} GB of K and V per slot" in choices.context.reason


@pytest.mark.parametrize("name", SHIPPED)
def test_choices_go_together(name: str) -> None:
    choices = load_profile(name).choices
    assert choices.canvases.value <= choices.slots.value
    assert choices.context.value <= SPEC.max_context
    assert choices.chunk.value % SPEC.canvas_length == 0


def test_the_cpu_profile_compiles_nothing_and_runs_everything() -> None:
    profile = load_profile("cpu")
    assert profile.sm is None
    assert profile.facts.product_names.value == []
    assert profile.choices.compiler.value == "torch"
    assert all(profile.runs(weights) for weights in ("plain", "int4", "fp8", "nvfp4"))
    assert planned(profile).ok


@pytest.mark.parametrize(
    ("name", "refused"), [("rtx-4090", "nvfp4"), ("h200", "nvfp4"), ("b200", None), ("dgx-spark", None)]
)
def test_formats_run_from_their_generation_on(name: str, refused: str | None) -> None:
    profile = load_profile(name)
    assert [weights for weights in ("plain", "int4", "fp8", "nvfp4") if not profile.runs(weights)] == (
        [] if refused is None else [refused]
    )


@pytest.mark.parametrize(
    ("path", "value", "parts"),
    [
        ("colour", "green", ["unknown key colour", "name, title, facts, choices"]),
        ("facts.tdp", 350, ["unknown key facts.tdp", "architecture, compute_capability, memory_gb"]),
        ("facts.tflops.value.fp6", 1, ["unknown key facts.tflops.value.fp6", "bf16, fp8, fp4, int8"]),
        ("choices.graph", {"value": True, "reason": "because it is"}, ["unknown key choices.graph"]),
        ("facts.memory_gb", 48, ["facts.memory_gb: "]),
        ("facts.memory_gb.source", REMOVED, ["facts.memory_gb.source: ", "required"]),
        ("facts.memory_gb.source", "NVIDIA", ["facts.memory_gb.source: ", "at least 8"]),
        ("facts.memory_gb.value", 0, ["facts.memory_gb.value: ", "greater than 0"]),
        ("facts.memory_gb.value", -48.3, ["facts.memory_gb.value: "]),
        ("facts.memory_gb.value", "48 GB", ["facts.memory_gb.value: ", "number"]),
        ("facts.memory_gb.value", float("nan"), ["facts.memory_gb.value: "]),
        ("facts.memory_gb.value", float("inf"), ["facts.memory_gb.value: "]),
        ("facts.memory_gb.value", 46068, ["facts.memory_gb.value: ", "4096"]),  # MiB
        ("facts.bandwidth_gb_s.value", 864e9, ["facts.bandwidth_gb_s.value: ", "100000"]),  # bytes
        ("facts.tflops.value.fp8", 733e12, ["facts.tflops.value.fp8: ", "1000000"]),
        ("facts.bandwidth_gb_s", REMOVED, ["facts.bandwidth_gb_s: ", "required"]),  # null has to be said
        ("facts.compute_capability.value", 8.9, ["facts.compute_capability.value: ", "string"]),  # 12.10 is not 12.1
        ("facts.compute_capability.value", "sm_89", ["facts.compute_capability.value: ", "pattern"]),
        ("facts.memory_is_shared", "no", ["facts.memory_is_shared: ", "boolean"]),
        ("facts.cpu_architectures.value", ["x86"], ["facts.cpu_architectures.value.0: ", "'amd64' or 'arm64'"]),
        ("facts.cpu_architectures.value", [], ["facts.cpu_architectures.value: ", "at least 1"]),
        ("facts.tflops.value.bf16", None, ["facts.tflops.value.bf16: "]),
        ("choices.compiler.value", "tensorrt_rtx", ["choices.compiler.value: ", "'tensorrt' or 'torch'"]),
        ("choices.compiler.reason", "", ["choices.compiler.reason: "]),
        ("choices.slots.value", 0, ["choices.slots.value: ", "1"]),
        ("choices.slots.value", 10_000, ["choices.slots.value: ", "256"]),
        ("choices.slots.value", "8", ["choices.slots.value: ", "integer"]),
        ("choices.slots.value", True, ["choices.slots.value: ", "integer"]),
        ("choices.context.value", 100, ["choices.context.value: ", "512"]),
        ("choices.context.value", 1_000_000, ["choices.context.value: ", "262144"]),
        ("choices.chunk.value", 8, ["choices.chunk.value: ", "16"]),
        ("choices.canvases.value", 65, ["choices.canvases.value: ", "64"]),
        ("choices.kv_type.value", "fp8", ["choices.kv_type.value: ", "'bf16'"]),  # the compilers have no such cache
        ("choices.moe.value", {"formulation": "capacity"}, ["choices.moe.value: ", "both of them"]),
        ("choices.moe.value", {"formulation": "dense", "encoder_capacity": 64}, ["choices.moe.value: ", "capacity"]),
        ("choices.moe.value.encoder_capacity", REMOVED, ["choices.moe.value: ", "both of them"]),
        ("choices.moe.value.decoder_capacity", 0, ["choices.moe.value.decoder_capacity: ", "1"]),
        ("choices.moe.value.formulation", "loop", ["choices.moe.value.formulation: ", "'capacity' or 'sparse'"]),
        ("name", "L40 S", ["name: ", "pattern"]),
        ("title", "", ["title: "]),
        ("choices", REMOVED, ["choices: ", "required"]),
    ],
)  # fmt: skip
def test_a_wrong_profile_is_refused_by_file_and_key(tmp_path: Path, path: str, value: Any, parts: list[str]) -> None:
    message = refusal(tmp_path, changed(path, value))
    assert [part for part in parts if part not in message] == [], message


def test_every_wrong_key_is_reported_at_once(tmp_path: Path) -> None:
    text = changed("colour", "green").replace("value: 864", "value: -864")
    assert refusal(tmp_path, text).count("; ") == 1


def test_a_key_that_is_given_twice_is_refused(tmp_path: Path) -> None:
    text = (FOLDER / "l40s.yaml").read_text(encoding="utf-8")
    assert "the key memory_is_shared is written twice" in refusal(
        tmp_path, text.replace("  memory_is_shared: false", "  memory_is_shared: false\n  memory_is_shared: true")
    )
    assert "the key name is written twice" in refusal(tmp_path, text + "name: other\n")


@pytest.mark.parametrize("text", ["", "- a", "text", "3"])
def test_a_file_that_is_no_mapping_is_refused_with_the_keys(tmp_path: Path, text: str) -> None:
    assert "must be a mapping with the keys name, title, facts, choices" in refusal(tmp_path, text)


@pytest.mark.parametrize("text", ["name: [", "a: b: c", "\0", "!!python/object:os.system x"])
def test_a_file_that_is_not_yaml_is_refused_and_runs_nothing(tmp_path: Path, text: str) -> None:
    assert "is not YAML: " in refusal(tmp_path, text)


def test_a_file_that_can_not_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.yaml").mkdir()
    for name in ("folder.yaml", "none.yaml", "none.yml"):
        with pytest.raises(InputError, match="can't be read") as caught:
            load_profile(str(tmp_path / name))
        assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize("name", ["a100", "RTX-4090", "profiles/h100", "", "h100.json"])
def test_an_unknown_name_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(InputError) as caught:
        load_profile(name)
    for part in (repr(name), *SHIPPED, ".yaml file of your own"):
        assert part in str(caught.value)


def test_a_profile_of_ones_own_loads_from_anywhere_under_any_name(tmp_path: Path) -> None:
    file = tmp_path / "somewhere.yaml"
    file.write_text(changed("name", "l40"), encoding="utf-8")
    assert load_profile(str(file)).name == "l40"


def test_a_profile_does_not_change(tmp_path: Path) -> None:
    profile = load_profile("h100")
    with pytest.raises(ValueError, match="frozen"):
        profile.name = "other"  # frozen, which is what is tested

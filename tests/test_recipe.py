"""Recipes: what the shipped ones are, which tensors they cover, and every refusal by file, key and reason."""

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml

from canvasrt.errors import InputError
from canvasrt.formats import Format
from canvasrt.inputs import input_folder
from canvasrt.quantize.recipe import Recipe, load_recipe, recipe_names
from canvasrt.serve.prompts import read_prompts
from canvasrt.spec import ModelSpec

SHIPPED = ("fp8", "int4-experts", "nvfp4", "nvfp4-experts")
CALIBRATION = {"file": "default.jsonl", "samples": 64, "canvases": 2, "steps": 12}
CONTENT: dict[str, Any] = {
    "name": "mine",
    "why": "to test",
    "tensors": {"experts": "nvfp4", "mlp": "nvfp4"},
    "kv_cache": "fp8",
    "algorithm": "max",
    "calibration": CALIBRATION,
}
INT4 = {"tensors": {"experts": "int4"}, "block": 64, "calibration": None}
REMOVED = object()
LAYER = "model.decoder.layers."
PARTS = {
    "experts": {f"{LAYER}{index}.experts.{name}" for index in (0, 1) for name in ("gate_up_proj", "down_proj")},
    # the last layer is a full one: its value is its key
    "attention": {
        f"{LAYER}{index}.self_attn.{name}_proj.weight" for index, names in ((0, "qkvo"), (1, "qko")) for name in names
    },
    "mlp": {f"{LAYER}{index}.mlp.{name}_proj.weight" for index in (0, 1) for name in ("gate", "up", "down")},
}


def spec(**text: int) -> ModelSpec:
    """Two layers; every width a multiple of 64 unless changed."""
    sizes = {
        "vocab_size": 24,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "global_head_dim": 32,
        "max_position_embeddings": 64,
        "sliding_window": 16,
        "num_experts": 2,
        "top_k_experts": 1,
        "moe_intermediate_size": 64,
    }
    return ModelSpec.from_config(
        {"model_type": "diffusion_gemma", "image_token_id": 20, "text_config": sizes | text}, "CONFIG"
    )


def loaded(folder: Path, content: Any = None, **changes: Any) -> Recipe:
    """The recipe of a file with this text, or with CONTENT changed."""
    if content is None:
        values = CONTENT | changes
        content = yaml.safe_dump({key: value for key, value in values.items() if value is not REMOVED})
    file = folder / "mine.yaml"
    file.write_text(content, encoding="utf-8")
    return load_recipe(str(file))


def refusal(folder: Path, content: Any = None, **changes: Any) -> str:
    """The message, which always names the file."""
    with pytest.raises(InputError) as caught:
        loaded(folder, content, **changes)
    message = str(caught.value)
    assert message.startswith(f"recipe {folder / 'mine.yaml'}")
    assert "\n" not in message
    assert not [word for word in ("pydantic", "Value error", "validation error", "[key]") if word in message]
    return message


def test_the_shipped_recipes_are_those_of_the_repository() -> None:
    assert tuple(recipe_names()) == SHIPPED
    folder = Path(__file__).parents[1] / "build" / "recipes"
    assert sorted(file.stem for file in folder.glob("*.y*ml")) == recipe_names()


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_loads_by_its_name_and_by_its_file(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe == load_recipe(str(input_folder("recipes") / f"{name}.yaml"))
    recipe.check(spec(hidden_size=2816, intermediate_size=2112, moe_intermediate_size=704))
    assert recipe.algorithm == "max"
    assert len(recipe.why.splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "form", "kv_cache", "parts"),
    [
        ("fp8", Format("fp8", "static"), "fp8", {"experts", "attention", "mlp"}),
        ("int4-experts", Format("int4", "none", 64), "bf16", {"experts"}),
        ("nvfp4", Format("nvfp4", "block", 16), "fp8", {"experts", "attention", "mlp"}),
        ("nvfp4-experts", Format("nvfp4", "block", 16), "fp8", {"experts"}),
    ],
)
def test_what_a_shipped_recipe_makes(name: str, form: Format, kv_cache: str, parts: set[str]) -> None:
    recipe = load_recipe(name)
    assert (recipe.format, recipe.kv_cache, set(recipe.tensors)) == (form, kv_cache, parts)


@pytest.mark.parametrize("name", SHIPPED)
def test_the_prompts_that_a_shipped_recipe_asks_for_exist(name: str) -> None:
    calibration = load_recipe(name).calibration
    if calibration is not None:
        assert calibration.samples <= len(read_prompts(input_folder("calibration") / calibration.file))


def test_weights_without_activations_need_no_calibration(tmp_path: Path) -> None:
    recipe = loaded(tmp_path, tensors={"mlp": "nvfp4-weights"}, calibration=None)
    assert recipe.format == Format("nvfp4", "none", 16)
    assert recipe.calibration is None


@pytest.mark.parametrize("parts", [parts for count in (1, 2, 3) for parts in combinations(PARTS, count)])
def test_exactly_the_matrices_of_the_named_parts_are_covered(tmp_path: Path, parts: tuple[str, ...]) -> None:
    """No router, norm, embedding or scalar, and nothing of the self-conditioning block."""
    recipe = loaded(tmp_path, tensors=dict.fromkeys(parts, "fp8"))
    found = {name for name in spec().tensors() if recipe.covers(name)}
    assert found == set().union(*(PARTS[part] for part in parts))


@pytest.mark.parametrize(
    "name",
    [
        "model.decoder.self_conditioning.gate_proj.weight",
        "model.decoder.self_conditioning.down_proj.weight",
        "model.decoder.layers.0.router.proj.weight",
        "model.decoder.layers.0.router.per_expert_scale",
        "model.decoder.embed_tokens.weight",
        "model.decoder.norm.weight",
        "model.decoder.layers.0.self_attn.q_norm.weight",
        "model.encoder.language_model.layers.0.layer_scalar",
    ],
)
def test_nothing_else_is_ever_covered(name: str) -> None:
    assert name in spec().tensors()
    assert not [recipe for recipe in SHIPPED if load_recipe(recipe).covers(name)]


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"colour": 1}, ["unknown key colour", "name, why, tensors, block, kv_cache, algorithm, modelopt"]),
        ({"calibration": CALIBRATION | {"seed": 1}}, ["unknown key calibration.seed", "file, samples, canvases, ste"]),
        ({"tensors": {"head": "nvfp4"}}, ["tensors.head", "'experts', 'attention' or 'mlp'"]),
        ({"tensors": {"mlp": "fp4"}}, ["tensors.mlp", "'nvfp4', 'nvfp4-weights', 'fp8' or 'int4'"]),
        ({"tensors": {"mlp": "nvfp4", "experts": "fp8"}}, ["tensors mixes fp8 and nvfp4", "one format"]),
        ({"tensors": {}}, ["tensors: ", "at least 1"]),
        ({"tensors": ["experts"]}, ["tensors: ", "dictionary"]),
        (INT4 | {"block": None}, ["block is for int4, and int4 needs it", "64"]),
        ({"block": 64}, ["block is for int4"]),
        (INT4 | {"block": 8}, ["block: ", "16"]),
        (INT4 | {"block": "64"}, ["block: ", "integer"]),
        ({"calibration": None}, ["nvfp4 scales activations, so it needs calibration"]),
        ({"tensors": {"mlp": "fp8"}, "calibration": None}, ["fp8 scales activations, so it needs calibration"]),
        ({"calibration": CALIBRATION | {"samples": "64"}}, ["calibration.samples: ", "integer"]),
        ({"calibration": CALIBRATION | {"samples": True}}, ["calibration.samples: ", "integer"]),
        ({"calibration": CALIBRATION | {"samples": 0}}, ["calibration.samples: ", "1"]),
        ({"calibration": CALIBRATION | {"steps": 49}}, ["calibration.steps: ", "48"]),
        ({"calibration": CALIBRATION | {"file": ""}}, ["calibration.file: "]),
        ({"calibration": "default.jsonl"}, ["calibration: "]),
        ({"calibration": REMOVED}, ["calibration: ", "required"]),  # null has to be said
        ({"why": REMOVED}, ["why: ", "required"]),
        ({"why": ""}, ["why: "]),
        ({"name": 5}, ["name: ", "string"]),
        ({"name": "../x"}, ["name: ", "pattern"]),
        ({"kv_cache": "int8"}, ["kv_cache: ", "'fp8' or 'bf16'"]),
        ({"modelopt": 1}, ["modelopt: ", "string"]),
        ({"algorithm": "mse"}, ["algorithm: mse is not supported: use max"]),
        ({"algorithm": ["max"]}, ["algorithm: ", "string"]),
    ],
)
def test_a_wrong_recipe_is_refused_by_file_and_key(tmp_path: Path, changes: dict[str, Any], parts: list[str]) -> None:
    message = refusal(tmp_path, **changes)
    assert [part for part in parts if part not in message] == [], message


@pytest.mark.parametrize(
    "name", ["awq", "AWQ", "awq_lite", "awq_clip", "smoothquant", "smooth_quant", "SmoothQuant", "svdquant"]
)
def test_a_search_that_folds_scales_into_shared_weights_is_refused_with_the_reason(tmp_path: Path, name: str) -> None:
    message = refusal(tmp_path, algorithm=name)
    for part in (f"algorithm: {name} folds a scale", "Encoder and decoder share them", "folded twice", "Use max"):
        assert part in message


def test_every_wrong_key_is_reported_at_once(tmp_path: Path) -> None:
    message = refusal(tmp_path, colour=1, kv_cache="int8", calibration=CALIBRATION | {"steps": 0})
    assert message.count("; ") == 2


@pytest.mark.parametrize("text", ["name: [", "a: b: c", "\0", "!!python/object:os.system x", "? [a]\n: b", "a: *b"])
def test_a_file_that_is_not_yaml_is_refused_and_runs_nothing(tmp_path: Path, text: str) -> None:
    assert "is not YAML: " in refusal(tmp_path, text)


@pytest.mark.parametrize(
    "text",
    [
        yaml.safe_dump(CONTENT).replace("name: mine", "name: 2024-13-45"),  # a date to YAML, but no month 13
        yaml.safe_dump(CONTENT).replace("samples: 64", f"samples: {'9' * 5000}"),
        "[" * 5000,
    ],
    ids=["date", "digits", "depth"],
)
def test_values_that_the_yaml_reader_stumbles_over_are_refused_by_file(tmp_path: Path, text: str) -> None:
    refusal(tmp_path, text)


def test_a_key_that_is_given_twice_is_refused(tmp_path: Path) -> None:
    refusal(tmp_path, yaml.safe_dump(CONTENT) + "kv_cache: bf16\n")


@pytest.mark.parametrize("text", ["", "- a", "text", "3"])
def test_a_file_that_is_no_mapping_is_refused_with_the_keys(tmp_path: Path, text: str) -> None:
    message = refusal(tmp_path, text)
    assert "must be a mapping" in message
    assert ", ".join(Recipe.model_fields) in message


def test_a_file_that_can_not_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.yaml").write_bytes(b"why: \xff")
    (tmp_path / "folder.yaml").mkdir()
    for name in ("text.yaml", "folder.yaml", "none.yaml", "none.yml"):
        with pytest.raises(InputError, match="can't be read") as caught:
            load_recipe(str(tmp_path / name))
        assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize("name", ["int8", "FP8", "recipes/fp8", "", "fp8.json"])
def test_an_unknown_name_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(InputError) as caught:
        load_recipe(name)
    for part in (repr(name), *SHIPPED, ".yaml"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("recipe", "sizes", "tensor", "width"),
    [
        ("nvfp4-experts", {"hidden_size": 40}, "experts.gate_up_proj", 40),
        ("nvfp4-experts", {"moe_intermediate_size": 24}, "experts.down_proj", 24),
        ("nvfp4", {"hidden_size": 72}, "self_attn.q_proj.weight", 72),
        ("nvfp4", {"intermediate_size": 100}, "mlp.down_proj.weight", 100),
        ("nvfp4", {"num_attention_heads": 2, "head_dim": 12}, "self_attn.o_proj.weight", 24),
        ("int4-experts", {"moe_intermediate_size": 96}, "experts.down_proj", 96),
        ("int4-experts", {"hidden_size": 32}, "experts.gate_up_proj", 32),
    ],
)
def test_a_width_that_does_not_divide_into_blocks_is_refused_by_tensor(
    recipe: str, sizes: dict[str, int], tensor: str, width: int
) -> None:
    chosen = load_recipe(recipe)
    with pytest.raises(InputError) as caught:
        chosen.check(spec(**sizes))
    for part in (f"recipe {recipe}", f"layers.0.{tensor} has {width} inputs", f"no multiple of {chosen.format.block}"):
        assert part in str(caught.value)
    load_recipe("fp8").check(spec(**sizes))  # one scale per matrix


def test_widths_of_parts_that_stay_as_they_are_may_be_any() -> None:
    load_recipe("nvfp4-experts").check(spec(intermediate_size=100, num_attention_heads=2, head_dim=12))
    load_recipe("int4-experts").check(spec(intermediate_size=100, num_attention_heads=2, head_dim=12))


def test_an_even_number_of_rows_packs_into_int4(tmp_path: Path) -> None:
    recipe = loaded(tmp_path, **INT4 | {"tensors": {"attention": "int4"}})
    recipe.check(spec(num_attention_heads=32, head_dim=2))  # k_proj has two rows

"""generation_config.json, request options, and what both resolve to; every refusal names what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers.models.diffusion_gemma.generation_diffusion_gemma import DiffusionGemmaGenerationConfig

from canvasrt.diffusion.params import GenerationConfig, RequestOptions, RequestParams, resolve
from canvasrt.diffusion.rule import temperature
from canvasrt.errors import CheckpointError, InputError

SAMPLER = {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": 0.2}
# As transformers writes it for the published checkpoint, with keys that are nothing to us.
PUBLISHED = {
    "bos_token_id": 2,
    "cache_implementation": None,
    "confidence_threshold": 0.01,
    "eos_token_id": [1, 106],
    "max_denoising_steps": 32,
    "max_new_tokens": 512,
    "pad_token_id": 0,
    "sampler_config": SAMPLER,
    "stability_threshold": 2,
    "t_max": 0.9,
    "t_min": 0.3,
    "transformers_version": "5.23.0",
}


def load(folder: Path, values: Any) -> GenerationConfig:
    text = values if isinstance(values, str) else json.dumps(values)
    (folder / "generation_config.json").write_text(text, encoding="utf-8")
    return GenerationConfig.load(folder)


def resolved(
    config: GenerationConfig | None = None,
    *,
    eos_token_ids: tuple[int, ...] = (1,),
    canvas: int = 256,
    prompt_tokens: int = 10,
    context: int = 4096,
    **options: Any,
) -> RequestParams:
    return resolve(
        config or GenerationConfig(),
        RequestOptions.parse(**options),
        eos_token_ids=eos_token_ids,
        canvas=canvas,
        vocabulary=1000,
        prompt_tokens=prompt_tokens,
        context=context,
    )


def test_without_a_file_the_documented_fallbacks_are_transformers_own(tmp_path: Path) -> None:
    config = GenerationConfig.load(tmp_path)
    params = resolved(config)
    expected = DiffusionGemmaGenerationConfig._get_default_generation_params()
    ours = {name: getattr(config, name) for name in expected if name not in {"sampler_config", "max_new_tokens"}}
    theirs = dict(expected)
    assert params.max_tokens == theirs.pop("max_new_tokens")
    assert params.entropy_bound == theirs.pop("sampler_config").entropy_bound
    assert ours == theirs
    assert {name: getattr(params, name) for name in theirs} == theirs


def test_a_file_as_transformers_writes_it_is_read(tmp_path: Path) -> None:
    config = load(tmp_path, PUBLISHED)
    assert config.model_dump() == {
        "max_new_tokens": 512,
        "max_denoising_steps": 32,
        "t_min": 0.3,
        "t_max": 0.9,
        "stability_threshold": 2,
        "confidence_threshold": 0.01,
        "sampler_config": {"cls_name": "EntropyBoundSamplerConfig", "entropy_bound": 0.2},
        "eos_token_id": (1, 106),
        "pad_token_id": 0,
    }


def test_null_values_are_not_set(tmp_path: Path) -> None:
    assert load(tmp_path, dict.fromkeys(PUBLISHED)) == GenerationConfig()


@pytest.mark.parametrize(("value", "expected"), [(7, {7}), ([7], {7}), ([7, 9], {7, 9}), ([], set()), (None, {1})])
def test_end_of_sequence_may_be_a_number_a_list_or_left_to_config_json(
    tmp_path: Path, value: Any, expected: set[int]
) -> None:
    assert resolved(load(tmp_path, {"eos_token_id": value})).stop_token_ids == expected


@pytest.mark.parametrize(
    ("sampler", "name"),
    [({"_cls_name": "MaskedSamplerConfig", "steps": 3}, "MaskedSamplerConfig"), ("greedy", "greedy")],
)
def test_an_unknown_sampler_is_refused_by_its_name(tmp_path: Path, sampler: Any, name: str) -> None:
    with pytest.raises(CheckpointError, match=name) as caught:
        load(tmp_path, {"sampler_config": sampler})
    assert str(tmp_path / "generation_config.json") in str(caught.value)
    assert "EntropyBoundSamplerConfig" in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", "null", '"x"', "\x00", "[" * 100_000, f'{{"a": {"9" * 5000}}}'], ids=range(8)
)
def test_a_file_that_is_no_json_object_is_refused_by_its_path(tmp_path: Path, text: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path, text)
    assert str(tmp_path / "generation_config.json") in str(caught.value)


def test_a_file_that_is_no_text_is_refused_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "generation_config.json"
    path.write_bytes(b"\xff\xfe{")
    with pytest.raises(CheckpointError, match="generation_config"):
        GenerationConfig.load(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_denoising_steps", "48"),
        ("max_denoising_steps", True),
        ("max_denoising_steps", 4.5),
        ("max_denoising_steps", 0),
        ("max_denoising_steps", 10**9),
        ("max_new_tokens", 0),
        ("max_new_tokens", [1]),
        ("t_min", "cold"),
        ("t_min", float("nan")),
        ("t_max", -1),
        ("t_max", float("inf")),
        ("stability_threshold", -1),
        ("confidence_threshold", 0),
        ("eos_token_id", "x"),
        ("eos_token_id", [1, "a"]),
        ("eos_token_id", -1),
        ("sampler_config", "EntropyBoundSamplerConfig"),
        ("sampler_config", {"_cls_name": "EntropyBoundSamplerConfig"}),
        ("sampler_config", SAMPLER | {"entropy_bound": -1}),
        ("sampler_config", SAMPLER | {"extra": 1}),
    ],
)
def test_a_wrong_value_is_refused_by_file_and_field_in_words_of_the_file(
    tmp_path: Path, field: str, value: Any
) -> None:
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path, {field: value})
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'generation_config.json'}: {field}")
    assert not [word for word in ("constrained", "_Sampler,", "pydantic", "tuple[") if word in message]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("seed", -1),
        ("seed", 2**64),
        ("seed", 1.0),
        ("seed", True),
        ("seed", "5"),
        ("max_tokens", 0),
        ("max_tokens", -5),
        ("max_denoising_steps", 0),
        ("max_denoising_steps", 10**9),
        ("t_min", float("nan")),
        ("t_min", -0.1),
        ("t_max", float("inf")),
        ("t_max", "hot"),
        ("entropy_bound", -0.1),
        ("entropy_bound", 0),
        ("entropy_bound", float("nan")),
        ("stability_threshold", -1),
        ("confidence_threshold", 0),
        ("top_k", -1),
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_p", float("nan")),
        ("stop", ("",)),
        ("stop", "abc"),
        ("stop", ("a", 5)),
        ("stop", tuple("abcdefghijklmnopq")),
        ("stop", ("x" * 100_000,)),
        ("stop_token_ids", (-1,)),
        ("stop_token_ids", tuple(range(65))),
        ("ignore_eos", 1),
        ("num_beams", 4),
    ],
)
def test_an_absurd_option_is_refused_by_its_name(option: str, value: Any) -> None:
    with pytest.raises(InputError) as caught:
        RequestOptions.parse(**{option: value})
    message = str(caught.value)
    assert message.startswith(option)
    assert len(message) < 1000  # it goes into logs and answers, whatever a client sent


def test_every_wrong_option_is_reported_at_once() -> None:
    with pytest.raises(InputError) as caught:
        RequestOptions.parse(seed=-1, top_p=2.0, colour="red")
    message = str(caught.value)
    assert "seed: " in message
    assert "top_p: " in message
    assert "colour: unknown option" in message


def test_the_limits_of_options_are_inside() -> None:
    RequestOptions.parse(seed=0, max_tokens=1, max_denoising_steps=1, t_min=0.0, top_k=0, stability_threshold=0)
    RequestOptions.parse(seed=2**64 - 1, max_denoising_steps=1024, top_p=1.0, t_max=100, stop=("x" * 256,) * 16)


@pytest.mark.parametrize(
    ("option", "key", "asked", "filed", "fallback"),
    [
        ("max_tokens", "max_new_tokens", 3, 512, 256),
        ("max_denoising_steps", "max_denoising_steps", 7, 32, 48),
        ("t_min", "t_min", 0.0, 0.3, 0.4),
        ("t_max", "t_max", 2.0, 0.9, 0.8),
        ("stability_threshold", "stability_threshold", 0, 2, 1),
        ("confidence_threshold", "confidence_threshold", 0.5, 0.01, 0.005),
        ("entropy_bound", "sampler_config", 5.0, 0.2, 0.1),
    ],
)
def test_the_request_goes_before_the_file_and_the_file_before_the_fallback(
    tmp_path: Path, option: str, key: str, asked: float, filed: float, fallback: float
) -> None:
    config = load(tmp_path, {key: SAMPLER if key == "sampler_config" else filed})
    assert getattr(resolved(config, **{option: asked}), option) == asked
    assert getattr(resolved(config), option) == filed
    assert getattr(resolved(), option) == fallback


def test_options_that_only_a_request_has_reach_the_parameters() -> None:
    params = resolved(seed=5, top_k=7, top_p=0.5, stop=("a", "b"), canvas=64)
    assert (params.seed, params.top_k, params.top_p, params.stop) == (5, 7, 0.5, ("a", "b"))
    assert (params.canvas, params.vocabulary) == (64, 1000)


def test_max_new_tokens_of_the_file_is_a_default_and_no_limit() -> None:
    config = GenerationConfig(max_new_tokens=256)
    assert resolved(config, max_tokens=2000).max_tokens == 2000
    assert resolved(config).max_tokens == 256
    # and gives way to a long prompt, where a request's own number would be refused
    assert resolved(config, prompt_tokens=900, context=1024, canvas=32).max_tokens == 96


@pytest.mark.parametrize(("prompt", "room"), [(10, 3840), (256, 3840), (257, 3584), (3840, 256)])
def test_answers_up_to_the_room_of_whole_canvases_are_taken_and_larger_ones_refused_with_the_numbers(
    prompt: int, room: int
) -> None:
    assert resolved(prompt_tokens=prompt, max_tokens=room).max_tokens == room
    with pytest.raises(InputError) as caught:
        resolved(prompt_tokens=prompt, max_tokens=room + 1)
    for number in (prompt, room, room + 1, 4096):
        assert str(number) in str(caught.value)


@pytest.mark.parametrize("prompt", [3841, 4096, 4097, 10**6])
def test_a_prompt_that_leaves_no_room_for_a_canvas_is_refused_with_the_length_that_fits(prompt: int) -> None:
    with pytest.raises(InputError) as caught:
        resolved(prompt_tokens=prompt)
    for number in (prompt, 256, 4096, 3840):
        assert str(number) in str(caught.value)
    resolved(prompt_tokens=3840)


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(InputError, match="prompt is empty"):
        resolved(prompt_tokens=0)


@pytest.mark.parametrize("options", [{"t_max": 0.3}, {"t_min": 0.9}, {"t_min": 0.5, "t_max": 0.4}])
def test_a_schedule_that_rises_is_refused_with_both_temperatures(options: dict[str, float]) -> None:
    with pytest.raises(InputError) as caught:
        resolved(**options)
    message, values = str(caught.value), {"t_min": 0.4, "t_max": 0.8} | options
    assert f"t_min {values['t_min']}" in message
    assert f"t_max {values['t_max']}" in message


def test_a_constant_schedule_is_taken() -> None:
    assert resolved(t_min=0.5, t_max=0.5).t_min == 0.5


@pytest.mark.parametrize("t_max", [0.0, 1e-46, 1e-44])
def test_a_schedule_that_reaches_temperature_zero_is_refused_before_it_reaches_a_runner(t_max: float) -> None:
    assert temperature(0.0, t_max, 1, 48) == 0
    with pytest.raises(InputError, match="t_max"):
        resolved(t_min=0.0, t_max=t_max)


def test_stop_tokens_outside_the_vocabulary_are_refused_by_number() -> None:
    with pytest.raises(InputError, match=r"stop_token_ids.*\[1000, 5000\].*1000"):
        resolved(stop_token_ids=(999, 1000, 5000))
    assert 999 in resolved(stop_token_ids=(999,)).stop_token_ids


def test_ignore_eos_drops_the_checkpoints_tokens_and_keeps_the_requests() -> None:
    config = GenerationConfig(eos_token_id=(1, 106))
    assert resolved(config, stop_token_ids=(9,)).stop_token_ids == {1, 106, 9}
    assert resolved(config, stop_token_ids=(9,), ignore_eos=True).stop_token_ids == {9}
    assert resolved(config, ignore_eos=True).stop_token_ids == frozenset()


def test_requests_without_a_seed_get_different_seeds_and_a_given_seed_is_kept() -> None:
    seeds = {resolved().seed for _ in range(20)}
    assert len(seeds) == 20
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert max(seeds) > 2**32
    assert resolved(seed=0).seed == 0

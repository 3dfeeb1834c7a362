"""Mistakes planted into the engine's network: each must be noticed, so that no comparison passes by not looking."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import canvasrt.compile.engine as engine_module
import canvasrt.engine_weights as weights_module
import canvasrt.network.attention as attention_module
import canvasrt.network.moe as moe_module
import canvasrt.network.sampler as sampler_module
import canvasrt.network.text as text_module
from canvasrt.checkpoint import Checkpoint
from canvasrt.compile.engine import GraphCache
from canvasrt.engine_weights import EngineWeight
from canvasrt.network.moe import MoeChoice
from canvasrt.network.names import decoder_layer
from canvasrt.ops.tensorrt_ops import TensorRTOps
from canvasrt.ops.tensorrt_weights import EngineWeights
from canvasrt.profiles.profile import Moe
from canvasrt.runtime.torch_runner import TorchRunner
from engine_host import HostPlan, exact_seats, short_search
from host_bundles import DENSE, capacity
from layouts import Layout, export
from parity import difference, request_logits
from test_engine_formats import DIMS, EQUAL, SEEDS, without_kv
from tiny import Dims, write

Patch = pytest.MonkeyPatch
Plant = Callable[[Patch], None]
NOTICED = 10 * EQUAL
# A full layer in front of others, so that its mask shows, and three layers, since a norm undoes the first one's scalar.
WIDE = Dims(layers="fsf", full_head_dim=264, full_kv_heads=2, window=9)
TIGHT, ROOMY = capacity(9, 6), capacity(99, 99)


def around(patch: Patch, owner: Any, name: str, wrong: Callable[..., Any]) -> None:
    """``wrong`` gets the original in front of its arguments."""
    original = getattr(owner, name)
    patch.setattr(owner, name, lambda *given, **more: wrong(original, *given, **more))


def plant_a_token_misses_the_first_key_that_it_may_see(patch: Patch) -> None:
    def wrong(original: Any, graph: Any, inputs: Any, kind: str, shapes: Any) -> Any:
        later = graph.elementwise("SUM", inputs[f"first.{kind}"], 1)
        return original(graph, {**inputs, f"first.{kind}": later}, kind, shapes)

    around(patch, engine_module, "_visible", wrong)


def plant_a_token_sees_one_key_too_many(patch: Patch) -> None:
    def wrong(original: Any, graph: Any, inputs: Any, kind: str, shapes: Any) -> Any:
        later = graph.elementwise("SUM", inputs[f"end.{kind}"], 1)
        return original(graph, {**inputs, f"end.{kind}": later}, kind, shapes)

    around(patch, engine_module, "_visible", wrong)


def plant_heads_turn_the_other_way(patch: Patch) -> None:
    def wrong(original: Any, graph: Any, inputs: Any, kind: str) -> Any:
        rotary = original(graph, inputs, kind)
        return replace(rotary, signed_sin=graph.unary("NEG", rotary.signed_sin))

    around(patch, engine_module, "_rotary", wrong)


def plant_both_halves_of_a_head_take_the_same_sign(patch: Patch) -> None:
    def wrong(original: Any, graph: Any, inputs: Any, kind: str) -> Any:
        right, sin = original(graph, inputs, kind), inputs[f"sin.{kind}"]
        both = graph.concat([sin, sin], -1)
        return replace(right, signed_sin=graph.reshape_to(both, (both, 0), (both, 1), 1, int(both.shape[-1])))

    around(patch, engine_module, "_rotary", wrong)


def plant_one_layer_scalar_for_both(patch: Patch) -> None:
    patch.setattr(text_module, "encoder_scalar", lambda layer: decoder_layer(layer) + "layer_scalar")


def plant_self_conditioning_for_context_tokens_too(patch: Patch) -> None:
    around(patch, text_module, "_embed", lambda f, ops, spec, inputs, phase: f(
        ops, spec, replace(inputs, is_canvas=None), phase))  # fmt: skip


def plant_no_self_conditioning(patch: Patch) -> None:
    around(patch, text_module, "_embed", lambda f, ops, spec, inputs, phase: f(
        ops, spec, replace(inputs, canvas=None), phase))  # fmt: skip


def plant_soft_embeddings_without_their_scale(patch: Patch) -> None:
    def wrong(original: Any, ops: Any, spec: Any, *given: Any) -> Any:
        found = original(ops, spec, *given)
        return replace(found, soft_embeddings=ops.multiply(found.soft_embeddings, spec.hidden_size**-0.5))

    around(patch, text_module, "predict", wrong)


def plant_soft_embeddings_without_temperature(patch: Patch) -> None:
    def wrong(original: Any, ops: Any, spec: Any, hidden: Any, temperature: Any, *given: Any) -> Any:
        return original(ops, spec, hidden, ops.add(ops.multiply(temperature, 0.0), 1.0), *given)

    around(patch, text_module, "predict", wrong)


def plant_no_softcap(patch: Patch) -> None:
    patch.setattr(sampler_module, "_softcapped", lambda ops, spec, raw: ops.cast(raw, "float32"))


def plant_gate_and_up_exchanged(patch: Patch) -> None:
    def wrong(self: Any, x: Any) -> Any:
        half = int(x.shape[-1]) // 2
        up, gate = self.split(x, [half, half], -1)
        return self.multiply(self.graph.activation("GELU_TANH", gate), up)

    patch.setattr(TensorRTOps, "gated_gelu", wrong)


def plant_gelu_by_the_error_function(patch: Patch) -> None:
    around(patch, engine_module.Graph, "activation", lambda f, graph, kind, x: f(
        graph, kind.replace("GELU_TANH", "GELU_ERF"), x))  # fmt: skip


def plant_keys_and_values_exchanged(patch: Patch) -> None:
    around(patch, GraphCache, "attend", lambda f, cache, ops, layer, q, k, v: f(cache, ops, layer, q, v, k))


def plant_full_layers_written_where_sliding_ones_are(patch: Patch) -> None:
    """The same place until a sliding buffer has moved."""

    def wrong(original: Any, cache: Any, *given: Any) -> Any:
        return original(replace(cache, writes=dict.fromkeys(cache.writes, cache.writes["sliding"])), *given)

    around(patch, GraphCache, "_append", wrong)


def plant_value_taken_after_the_key_norm(patch: Patch) -> None:
    def wrong(original: Any, ops: Any, spec: Any, layer: Any, *given: Any) -> Any:
        q, k, v = original(ops, spec, layer, *given)
        return (q, k, k) if layer.value_is_key else (q, k, v)

    around(patch, attention_module, "_project", wrong)


def plant_norms_of_query_and_key_exchanged(patch: Patch) -> None:
    def wrong(original: Any, ops: Any, x: Any, cos: Any, sin: Any, query: Any, key: Any) -> Any:
        return original(ops, x, cos, sin, (key[0], query[1]), (query[0], key[1]))

    around(patch, TensorRTOps, "rotate", wrong)


def plant_router_without_its_factor(patch: Patch) -> None:
    around(patch, TensorRTOps, "linear_scaled", lambda f, ops, x, scale, *names, factor=1.0: f(ops, x, scale, *names))


def plant_experts_without_their_own_scale(patch: Patch) -> None:
    def wrong(original: Any, ops: Any, scores: Any, scale: str, k: int) -> Any:
        experts, weights = original(ops, scores, scale, k)
        return experts, ops.divide(weights, ops.take_rows(ops.weight(scale, "float32"), experts))

    around(patch, TensorRTOps, "route", wrong)


# With "capacity" only.


def plant_capacity_every_seat_computes_the_first_token(patch: Patch) -> None:
    patch.setattr(TensorRTOps, "scatter", lambda ops, base, indices, values: base)


def plant_capacity_seats_counted_from_one(patch: Patch) -> None:
    """A token reads the result of the next seat."""
    around(patch, TensorRTOps, "take_along_last", lambda f, ops, x, indices: ops.add(f(ops, x, indices), 1.0))

    def scatter(original: Any, ops: Any, base: Any, indices: Any, values: Any) -> Any:
        return original(ops, base, ops.maximum(ops.subtract(indices, 1), 0), values)

    around(patch, TensorRTOps, "scatter", scatter)


def plant_tight_the_busiest_expert_told_too_low(patch: Patch) -> None:
    def wrong(original: Any, ops: Any, *given: Any) -> Any:
        result, busiest = original(ops, *given)
        return result, ops.subtract(busiest, 1.0)

    around(patch, moe_module, "_capacity", wrong)


def plant_tight_the_busiest_expert_of_the_last_layer_only(patch: Patch) -> None:
    around(patch, TensorRTOps, "maximum", lambda f, ops, a, b: b if tuple(a.shape) == (1, 1) else f(ops, a, b))


# Heads too wide for a fused kernel only.


def plant_wide_mask_lines_in_the_order_of_heads(patch: Patch) -> None:
    def wrong(self: Any, mask: Any, times: int) -> Any:
        return self.graph.concat([mask] * times, 2)

    patch.setattr(TensorRTOps, "_repeated", wrong)


PLANTS: dict[str, Plant] = {
    name.removeprefix("plant_"): value for name, value in sorted(globals().items()) if name.startswith("plant_")
}


@pytest.fixture(scope="module", autouse=True)
def no_slack() -> Iterator[None]:
    """Nobody asks for top-k or top-p here, and seats that nobody needs would hide mistakes."""
    with short_search(1), exact_seats():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("traps"), WIDE, seed=11)


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[np.ndarray]:
    return request_logits(TorchRunner.open(folder, context=96, chunk=16))


def formulation(name: str) -> Moe:
    return ROOMY if name.startswith("capacity") else TIGHT if name.startswith("tight") else DENSE


@pytest.mark.parametrize("moe", [DENSE, TIGHT, ROOMY])
def test_without_a_planted_mistake_the_torch_runner_is_met(folder: Path, expected: list[np.ndarray], moe: Moe) -> None:
    runner = HostPlan(folder, moe=moe).open()
    assert difference(request_logits(runner), expected) < EQUAL
    assert runner.repeated > 0 if moe is TIGHT else runner.repeated == 0


@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_mistake_is_noticed(
    folder: Path, expected: list[np.ndarray], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    PLANTS[name](monkeypatch)
    runner = HostPlan(folder, moe=formulation(name)).open()
    assert not difference(request_logits(runner), expected) < NOTICED  # NaN is noticed too


# Quantized checkpoints: layout, formulation, plant.


def no_multiplier(patch: Patch) -> None:
    patch.setattr(EngineWeights, "_multiplier", lambda self, key, names, shape: None)


def multipliers_in_another_order(patch: Patch) -> None:
    def wrong(original: Any, weights: EngineWeights, weight: EngineWeight) -> Any:
        backwards = replace(weight, parts=weight.parts[::-1])
        return original(weights, backwards if weight.name.endswith(".multiplier") else weight)

    around(patch, EngineWeights, "_constant", wrong)


def no_shares(patch: Patch) -> None:
    around(patch, EngineWeights, "summed_experts", lambda f, self, name: (f(self, name)[0], None))


def activations_as_they_are(patch: Patch) -> None:
    patch.setattr(TensorRTOps, "_met", lambda self, x, form, scale: (x, None))


def activations_with_another_scale(patch: Patch) -> None:
    around(patch, EngineWeights, "_input_scale", lambda f, self, name: f(self, name) * 1.5)


def token_scales_not_undone(patch: Patch) -> None:
    around(patch, TensorRTOps, "_met", lambda f, self, x, form, scale: (f(self, x, form, scale)[0], None))


def nibbles_exchanged(patch: Patch) -> None:
    around(patch, weights_module, "_columns_packed", lambda f, array: (lambda whole: whole >> 4 | whole << 4)(f(array)))


def rows_of_a_byte_exchanged(patch: Patch) -> None:
    around(patch, weights_module, "_columns_packed", lambda f, array: f(array >> 4 | array << 4))


def experts_below_each_other(patch: Patch) -> None:
    patch.setattr(weights_module, "_side_by_side", lambda pieces, weight: np.concatenate([p.ravel() for p in pieces]))


QUANTIZED: list[tuple[Layout, Moe, Plant]] = [
    ("w4a16-nvfp4", ROOMY, no_multiplier),
    ("w4a16-nvfp4", ROOMY, multipliers_in_another_order),
    ("w4a16-nvfp4", DENSE, no_shares),
    ("w4a16-nvfp4", DENSE, experts_below_each_other),
    ("fp8", ROOMY, multipliers_in_another_order),
    ("fp8", ROOMY, activations_as_they_are),
    ("fp8", ROOMY, activations_with_another_scale),
    ("nvfp4", ROOMY, activations_as_they_are),
    ("nvfp4", ROOMY, activations_with_another_scale),
    ("fp8-dynamic", ROOMY, activations_as_they_are),
    ("fp8-dynamic", ROOMY, token_scales_not_undone),
    ("int4-experts", DENSE, experts_below_each_other),
    ("int4-experts", ROOMY, nibbles_exchanged),
    ("int4-experts", ROOMY, rows_of_a_byte_exchanged),
]


@pytest.fixture(scope="module")
def equal(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, list[np.ndarray]]]:
    """A checkpoint of a layout whose logits are equal without a mistake (see test_engine_formats.py), and these."""

    @cache
    def found(layout: Layout, moe: Moe) -> tuple[Path, list[np.ndarray]]:
        for seed in SEEDS:
            plain = write(tmp_path_factory.mktemp("plain"), DIMS, seed)
            made = without_kv(export(plain, layout)).write(tmp_path_factory.mktemp("made") / "made")
            runner = TorchRunner(Checkpoint.open(made), context=96, exact=True, moe=MoeChoice(moe.formulation, 99))
            logits = request_logits(runner)
            if difference(request_logits(HostPlan(made, moe=moe).open()), logits) < EQUAL:
                return made, logits
        pytest.fail(f"{layout} equals the torch runner for no seed")

    return found


@pytest.mark.parametrize(
    ("layout", "moe", "plant"), QUANTIZED, ids=[f"{q[0]}-{q[1].formulation}-{q[2].__name__}" for q in QUANTIZED]
)
def test_a_mistake_with_quantized_matrices_is_noticed(
    equal: Callable[..., tuple[Path, list[np.ndarray]]],
    layout: Layout,
    moe: Moe,
    plant: Plant,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, logits = equal(layout, moe)
    plant(monkeypatch)
    assert not difference(request_logits(HostPlan(folder, moe=moe).open()), logits) < NOTICED

"""Quantized checkpoints in the engine's network: the rounding of the torch runner's exact arithmetic, format by format.

A sum in another order can round one activation in a million to its neighbour, and a router then picks another expert: a
wrong rule is wrong for every seed, an unlucky sum is not. So one of several seeds has to be equal all the way.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from canvasrt.checkpoint import Checkpoint
from canvasrt.compile.source import ModelSource
from canvasrt.errors import CheckpointError, InputError
from canvasrt.network.moe import Formulation, MoeChoice
from canvasrt.ops.torch_exact import ExactTorchOps
from canvasrt.runtime.torch_runner import TorchRunner
from engine_host import HostPlan, short_search
from host_bundles import DENSE, capacity
from layouts import LAYOUTS, Export, Layout, export
from parity import difference, request_logits
from tiny import Dims, write

DIMS = Dims(
    layers="sf", hidden=64, mlp=96, expert_size=64, head_dim=16, full_head_dim=32, embedding_scale=0.2
)  # every matrix divides into blocks of 16
SEEDS = (3, 7, 5, 9)
EQUAL = 1e-5
ROUNDS: tuple[Layout, ...] = ("nvfp4-experts", "nvfp4", "fp8", "fp8-dynamic")  # activations too
Change = Callable[[Export], None]


@pytest.fixture(scope="module", autouse=True)
def no_limits() -> Iterator[None]:
    """Nobody asks for top-k or top-p here."""
    with short_search(1):
        yield


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    found: dict[int, Path] = {}

    def source(seed: int) -> Path:
        if seed not in found:
            found[seed] = write(tmp_path_factory.mktemp("source"), DIMS, seed)
        return found[seed]

    return source


def no_change(content: Export) -> None:
    pass


def without_kv(content: Export) -> Export:
    """K/V in the model's precision, as an engine keeps it whatever the checkpoint was quantized for."""
    if "quantization_config" in content.config:
        content.config["quantization_config"]["kv_cache_scheme"] = None
    if content.own is not None:
        content.own["quantization"]["kv_cache_quant_algo"] = None
    return content


def each_scale(content: Export, *suffixes: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and value of every stored tensor of the layers' matrices that ends in one of ``suffixes``."""
    yield from [(name, value) for name, value in content.tensors.items() if name.endswith(suffixes)]


def engine_logits(checkpoint: Checkpoint, formulation: Formulation) -> list[np.ndarray]:
    moe = DENSE if formulation == "dense" else capacity(24, 12)
    return request_logits(HostPlan(checkpoint.folder, moe=moe).open())


def torch_logits(checkpoint: Checkpoint, formulation: Formulation, exact: bool = True) -> list[np.ndarray]:
    return request_logits(TorchRunner(checkpoint, context=96, exact=exact, moe=MoeChoice(formulation, 64)))


def compare(
    sources: Callable[[int], Path], folder: Path, layout: Layout, formulation: Formulation, change: Change = no_change
) -> Checkpoint:
    """One seed must be equal; returns its checkpoint."""
    found = []
    for seed in SEEDS:
        content = without_kv(export(sources(seed), layout))
        change(content)
        made = Checkpoint.open(content.write(folder / str(seed), shards=3))
        ours = engine_logits(made, formulation)
        found.append(difference(ours, torch_logits(made, formulation)))
        if found[-1] < EQUAL:
            rounding = difference(torch_logits(made, formulation, exact=False), ours)
            assert rounding > 1e-3 if layout in ROUNDS else rounding < EQUAL
            return made
    pytest.fail(f"differences {found}")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_capacity_rounds_as_the_torch_runner(sources: Callable[[int], Path], tmp_path: Path, layout: Layout) -> None:
    compare(sources, tmp_path, layout, "capacity")


def shares_of(checkpoint: Checkpoint, name: str) -> np.ndarray:
    """Scale of each expert's matrix relative to the largest of them."""
    matrices = checkpoint.stored(name).matrices
    infos = [matrix.global_scale or matrix.scale for matrix in matrices]
    scales = np.array([checkpoint.array(info.name).item() for info in infos if info is not None], np.float32)
    return scales / scales.max()


@pytest.fixture
def share_before_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """The torch runner's dense formulation as an engine has it: one product sums over the experts.

    So what tells their matrices' scales apart has to multiply the activations, and does so before they are rounded.
    """

    def summed(self: Any, x: torch.Tensor, name: str) -> torch.Tensor:
        checkpoint = self._weights._checkpoint
        experts, _, size = checkpoint.stored(name).shape
        shares = torch.from_numpy(shares_of(checkpoint, name))
        met = self._met((x.view(len(x), experts, -1) * shares.view(1, -1, 1)).flatten(1), name)
        return met @ (self._weights.summed_experts(name) / shares.repeat_interleave(size)).T

    monkeypatch.setattr(ExactTorchOps, "experts_summed", summed)


@pytest.mark.parametrize("layout", ["nvfp4-experts", "nvfp4", "w4a16-nvfp4", "fp8"])
@pytest.mark.usefixtures("share_before_rounding")
def test_dense_rounds_as_the_torch_runner_would_behind_the_experts_shares(
    sources: Callable[[int], Path], tmp_path: Path, layout: Layout
) -> None:
    made = compare(sources, tmp_path, layout, "dense")
    assert len(set(shares_of(made, "model.decoder.layers.0.experts.down_proj"))) == DIMS.experts


def test_dense_with_scales_of_four_bit_blocks_only(sources: Callable[[int], Path], tmp_path: Path) -> None:
    compare(sources, tmp_path, "int4-experts", "dense")


@pytest.mark.parametrize("layout", ["nvfp4-experts", "fp8"])
def test_dense_rounds_as_the_torch_runner_where_experts_share_a_scale(
    sources: Callable[[int], Path], tmp_path: Path, layout: Layout
) -> None:
    def one_scale(content: Export) -> None:
        for name, scale in each_scale(
            content, "down_proj." + ("weight_scale" if layout == "fp8" else "weight_scale_2")
        ):
            if ".experts." in name:
                content.tensors[name] = torch.full_like(scale, 3e-4 if layout == "nvfp4-experts" else 2e-3)

    compare(sources, tmp_path, layout, "dense", one_scale)


@pytest.mark.parametrize("layout", ["nvfp4-experts", "nvfp4", "w4a16-nvfp4", "fp8"])
def test_matrices_with_scales_of_their_own_are_exact(
    sources: Callable[[int], Path], tmp_path: Path, layout: Layout
) -> None:
    """Gate and up of an expert, experts among each other, query, key and value: up to a factor of 6 apart."""

    def apart(content: Export) -> None:
        for index, (name, scale) in enumerate(
            each_scale(content, "weight_scale" if layout == "fp8" else "weight_scale_2")
        ):
            content.tensors[name] = scale * (0.5 + 0.7 * (index % 5))

    compare(sources, tmp_path, layout, "capacity", apart)


@pytest.mark.parametrize("layout", ["nvfp4", "fp8"])
def test_matrices_that_read_one_input_with_one_scale_are_one_product(
    sources: Callable[[int], Path], tmp_path: Path, layout: Layout
) -> None:
    """As ModelOpt exports them; with scales of their own, query, key and value are products apart."""

    def one_input_scale(content: Export) -> None:
        for name, scale in list(each_scale(content, "q_proj.input_scale", "gate_proj.input_scale")):
            for twin in ("k_proj", "v_proj", "up_proj"):
                other = name.replace("q_proj" if "q_proj" in name else "gate_proj", twin)
                if other in content.tensors:
                    content.tensors[other] = scale.clone()

    made = compare(sources, tmp_path, layout, "capacity", one_input_scale)
    apart = Checkpoint.open(without_kv(export(sources(3), layout)).write(tmp_path / "apart"))
    for checkpoint, fused in ((made, True), (apart, False)):
        plan = HostPlan(checkpoint.folder)
        network = plan.network
        names = {network.get_layer(index).name for index in range(network.num_layers)}
        prefix = "model.decoder.layers.0."
        assert (f"{prefix}self_attn.q_proj.weight+k_proj+v_proj" in names) == fused
        assert (f"{prefix}self_attn.q_proj.weight" in names) != fused
        assert (f"{prefix}mlp.gate_proj.weight+up_proj" in names) == fused


@pytest.mark.parametrize("layout", ["nvfp4-experts", "fp8"])
def test_gate_and_up_of_an_expert_read_one_input_by_the_larger_scale(
    sources: Callable[[int], Path], tmp_path: Path, layout: Layout
) -> None:
    def apart(content: Export) -> None:
        for name, scale in each_scale(content, "up_proj.input_scale"):
            if ".experts." in name:
                content.tensors[name] = scale * 1.7

    compare(sources, tmp_path, layout, "capacity", apart)


def test_fp8_weights_without_rounded_activations(sources: Callable[[int], Path], tmp_path: Path) -> None:
    content = export(sources(3), "fp8-dynamic")
    content.config["quantization_config"]["config_groups"]["group_0"]["input_activations"] = None
    made = Checkpoint.open(content.write(tmp_path / "made"))
    assert difference(engine_logits(made, "capacity"), torch_logits(made, "capacity", exact=False)) < EQUAL


def test_a_token_of_zeros_stays_zero_where_tokens_have_scales(sources: Callable[[int], Path], tmp_path: Path) -> None:
    def no_gates(content: Export) -> None:
        for name in content.tensors:
            if name.endswith(("mlp.gate_proj.weight", "experts.0.gate_proj.weight")):
                content.tensors[name] = torch.zeros_like(content.tensors[name].view(torch.uint8)).view(
                    torch.float8_e4m3fn
                )

    compare(sources, tmp_path, "fp8-dynamic", "capacity", no_gates)


def test_the_engine_keeps_its_own_precision_of_keys_and_values(sources: Callable[[int], Path], tmp_path: Path) -> None:
    """A checkpoint may declare an FP8 cache: it says what the scales were calibrated with."""
    declared = export(sources(3), "w4a16-nvfp4")
    folders = declared.copy().write(tmp_path / "fp8"), without_kv(declared).write(tmp_path / "bf16")
    assert [ModelSource.open(folder).kv_cache for folder in folders] == ["fp8", "bf16"]
    ours, expected = (engine_logits(Checkpoint.open(folder), "capacity") for folder in folders)
    np.testing.assert_array_equal(ours, expected)


def opened(
    sources: Callable[[int], Path], folder: Path, layout: Layout, formulation: Formulation, change: Change
) -> None:
    content = export(sources(3), layout)
    change(content)
    HostPlan(content.write(folder / layout), moe=DENSE if formulation == "dense" else capacity(8, 8))


@pytest.mark.parametrize("rounds", [True, False])
def test_dense_refuses_a_scale_for_each_row_and_says_what_to_do(
    sources: Callable[[int], Path], tmp_path: Path, rounds: bool
) -> None:
    def change(content: Export) -> None:
        if not rounds:
            content.config["quantization_config"]["config_groups"]["group_0"]["input_activations"] = None

    with pytest.raises(InputError, match=r"experts\.0\.down_proj\.weight_scale has a scale for each row.*capacity"):
        opened(sources, tmp_path, "fp8-dynamic", "dense", change)


def set_scale(suffix: str, value: float) -> Change:
    def change(content: Export) -> None:
        found = list(each_scale(content, suffix))
        assert found
        name, scale = found[-1]
        content.tensors[name] = torch.full_like(scale, value)

    return change


@pytest.mark.parametrize("formulation", ["dense", "capacity"])
@pytest.mark.parametrize("layout", ["nvfp4-experts", "fp8"])
def test_experts_with_input_scales_of_their_own_are_refused(
    sources: Callable[[int], Path], tmp_path: Path, layout: Layout, formulation: Formulation
) -> None:
    with pytest.raises(CheckpointError, match=r"experts\.down_proj have input scales of their own \([0-9.]+ to 7\)"):
        opened(sources, tmp_path, layout, formulation, set_scale("experts.3.down_proj.input_scale", 7.0))


BAD = [
    ("fp8", "q_proj.input_scale", 0.0, "q_proj.input_scale is 0, and a scale must be above 0"),
    ("fp8", "q_proj.input_scale", -1.0, "q_proj.input_scale is -1, and a scale must be above 0"),
    ("fp8", "q_proj.input_scale", float("nan"), "q_proj.input_scale in .* NaN or infinite"),
    ("nvfp4-experts", "experts.1.up_proj.input_scale", 0.0, "up_proj.input_scale is 0, and a scale must be above 0"),
    ("nvfp4-experts", "experts.1.up_proj.input_scale", float("inf"), "up_proj.input_scale in .* NaN or infinite"),
    ("nvfp4-experts", "gate_proj.weight_scale_2", float("nan"), "gate_proj.weight_scale_2 in .* NaN or infinite"),
    ("nvfp4-experts", "gate_proj.weight_scale", float("nan"), "gate_proj.weight_scale in .* NaN or infinite"),
    ("w4a16-nvfp4", "o_proj.weight_scale_2", float("inf"), "o_proj.weight_scale_2 in .* NaN or infinite"),
    ("fp8", "o_proj.weight", float("nan"), "o_proj.weight in .* NaN or infinite"),
    ("fp8", "o_proj.weight_scale", float("nan"), "o_proj.weight_scale in .* NaN or infinite"),
    ("fp8-dynamic", "k_proj.weight_scale", float("nan"), "k_proj.weight_scale in .* NaN or infinite"),
    ("int4-experts", "experts.2.down_proj.weight_scale", float("inf"), "down_proj.weight_scale in .* NaN or infinite"),
]


@pytest.mark.parametrize(("layout", "suffix", "value", "message"), BAD)
def test_scales_that_are_no_scales_are_refused_by_name(
    sources: Callable[[int], Path], tmp_path: Path, layout: Layout, suffix: str, value: float, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        opened(sources, tmp_path, layout, "capacity", set_scale(suffix, value))


@pytest.mark.parametrize(("layout", "suffix"), [("fp8", "weight_scale"), ("nvfp4-experts", "weight_scale_2")])
@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_dense_refuses_an_expert_whose_scale_is_none(
    sources: Callable[[int], Path], tmp_path: Path, layout: Layout, suffix: str, value: float
) -> None:
    message = rf"experts\.2\.down_proj\.{suffix} " + ("is 0, and a scale must be" if value == 0 else "in .* NaN")
    with pytest.raises(CheckpointError, match=message):
        opened(sources, tmp_path, layout, "dense", set_scale(f"experts.2.down_proj.{suffix}", value))

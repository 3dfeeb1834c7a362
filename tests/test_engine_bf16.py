"""The network in BF16, the precision that is built: as far from float32 as transformers in bfloat16, and no further."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from canvasrt.checkpoint import Checkpoint
from canvasrt.reference.model import ReferenceModel
from canvasrt.reference.verify import MAX_ERROR_RATIO
from canvasrt.runtime.protocol import DenoiseRow, EncodeRow
from engine_host import HostPlan, short_search
from host_bundles import DENSE, Host, capacity
from layouts import LAYOUTS, Layout, export
from rounded_reference import rounded_reference
from tiny import Dims, write

STEPS, HEAT = 4, 0.6
# Every token through every expert: a rounded router score then changes a weight a little, and no expert.
STEADY = Dims(layers="sf", hidden=64, mlp=96, expert_size=64, head_dim=16, full_head_dim=32, top_k=4)
MOES = {"dense": DENSE, "capacity": capacity(24, 12)}


@pytest.fixture(scope="module", autouse=True)
def no_limits() -> Iterator[None]:
    """Nobody asks for top-k or top-p here."""
    with short_search(1):
        yield


def errors(folder: Path, formulation: str, references: list[ReferenceModel], seed: int) -> tuple[float, float]:
    """Mean distance of our logits and of the rounded reference's from the exact reference's, each self-conditioned.

    ``references``: in float32, then in bfloat16.
    """
    host = Host()
    runner = HostPlan(folder, precision="bf16", moe=MOES[formulation], context=64).open(host)
    rng = np.random.default_rng(seed)
    prompt = rng.integers(0, 67, 28).astype(np.int32)
    runner.encode([EncodeRow(0, prompt, 0)])
    caches = [reference.encode(prompt) for reference in references]
    previous: list[torch.Tensor | None] = [None, None]
    ours = theirs = 0.0
    for step in range(STEPS):
        canvas = rng.integers(0, 67, 12).astype(np.int32)
        row = DenoiseRow(0, canvas, HEAT, np.full(12, 0.5, np.float32), first=step == 0, want_logits=True)
        result = runner.denoise([row])[0]
        exact, rounded = (
            reference.denoise(cache, canvas, before).float()
            for reference, cache, before in zip(references, caches, previous, strict=True)
        )
        previous = [exact / HEAT, rounded / HEAT]
        assert np.isfinite(result.logits).all()
        ours += float((torch.from_numpy(result.logits) - exact).abs().mean() / exact.abs().max())
        theirs += float((rounded - exact).abs().mean() / exact.abs().max())
    assert host.library.last[1]["soft.next"].dtype == torch.bfloat16
    return ours, theirs


def test_a_plain_checkpoint(tmp_path: Path) -> None:
    ours, theirs = dict.fromkeys(MOES, 0.0), 0.0
    for seed in range(3):
        source = Checkpoint.open(write(tmp_path / str(seed), STEADY, seed))
        references = [ReferenceModel.load(source, dtype) for dtype in (torch.float32, torch.bfloat16)]
        for formulation in MOES:
            ours[formulation] += (found := errors(source.folder, formulation, references, seed))[0]
        theirs += found[1]
    assert theirs > 0
    assert all(0.5 * theirs < each < 1.25 * theirs for each in ours.values()), f"{ours}, theirs {theirs}"


@pytest.mark.parametrize("formulation", MOES)
def test_a_plain_checkpoint_whose_router_may_choose_otherwise(tmp_path: Path, formulation: str) -> None:
    """One flipped expert reaches a whole canvas, in their run or in ours: the median of some seeds says something."""
    ratios = []
    for seed in range(5):
        source = Checkpoint.open(write(tmp_path / str(seed), Dims(layers="ssf", hidden=64, mlp=64), seed))
        references = [ReferenceModel.load(source, dtype) for dtype in (torch.float32, torch.bfloat16)]
        ours, theirs = errors(source.folder, formulation, references, seed)
        ratios.append(ours / theirs)
    assert np.median(ratios) < MAX_ERROR_RATIO, f"{ratios}"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_quantized_checkpoints(tmp_path: Path, layout: Layout) -> None:
    ours, theirs = dict.fromkeys(MOES, 0.0), 0.0
    if layout == "fp8-dynamic":
        del ours["dense"]  # refused: tests/test_engine_formats.py
    for seed in range(2):
        plain = write(tmp_path / f"plain-{seed}", STEADY, seed)
        content = export(plain, layout)
        folder = content.write(tmp_path / f"made-{seed}")
        references = [rounded_reference(plain, content, layout, dtype) for dtype in (torch.float32, torch.bfloat16)]
        for formulation in ours:
            ours[formulation] += (found := errors(folder, formulation, references, seed))[0]
        theirs += found[1]
    assert theirs > 0
    assert ours["capacity"] < 1.3 * theirs
    # Dense rounds behind the routing weights and the experts' shares, the reference before them.
    assert ours.get("dense", 0) < 2 * theirs

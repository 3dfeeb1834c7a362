"""What a bundle takes of a GPU, against arithmetic by hand, and whether what a message advises really fits."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bundles import engine, manifest
from canvasrt.bundle.manifest import EngineTensor, Manifest
from canvasrt.compile.shapes import engine_shapes
from canvasrt.compile.vram import Deployment, vram_budget
from canvasrt.errors import BundleError, CapacityError
from canvasrt.runtime.engine_memory import (
    EngineMemory,
    check_memory,
    element_bytes,
    engine_memory,
    shortage,
    slot_buffers,
    text_engine,
)
from canvasrt.runtime.kv_memory import EXCHANGE_BYTES, Buffer, KvMemory
from canvasrt.spec import ModelSpec

PUBLISHED = ModelSpec.load(Path(__file__).parent / "fixtures" / "diffusiongemma-26b-a4b")
HIDDEN, VOCABULARY, CANVAS, CANVASES, CHUNK = 2816, 262_144, 256, 4, 2048
SLIDING_ROWS = 1023 + 2048 + 256
GB = 10**9


def published(
    context: int = 32_768, layers: int = 30, width: str = "bf16", chunk: int = CHUNK, canvases: int = CANVASES,
) -> tuple[Manifest, ModelSpec]:  # fmt: skip
    """The 26B, or the first of its layers."""
    sliding = 1023 + max(chunk, CANVAS) + CANVAS
    spec = replace(PUBLISHED, layers=PUBLISHED.layers[:layers])
    buffers = [
        {"name": f"{name}.{layer.index}", "mode": "input", "dtype": width, "aliases": None,
         "shape": [-1, layer.kv_heads, context if layer.kind == "full" else sliding, layer.head_dim]}
        for layer in spec.layers for name in ("k", "v")
    ]  # fmt: skip
    tensors = [
        {"name": "tokens", "mode": "input", "dtype": "int32", "shape": [-1, -1], "aliases": None},
        {"name": "soft", "mode": "input", "dtype": width, "shape": [-1, -1, HIDDEN], "aliases": None},
        {"name": "embedding", "mode": "input", "dtype": "bf16", "shape": [VOCABULARY, HIDDEN], "aliases": None},
        {"name": "embedding.rows", "mode": "input", "dtype": "bf16", "shape": [VOCABULARY, HIDDEN],
         "aliases": "embedding"},
        *buffers,
        *({**each, "name": f"{each['name']}.next", "mode": "output", "aliases": each["name"]} for each in buffers),
        {"name": "logits", "mode": "output", "dtype": "float", "shape": [-1, VOCABULARY], "aliases": None},
    ]  # fmt: skip
    shapes = {
        "slots": 4, "context": context, "chunk": chunk, "canvases": canvases, "canvas": CANVAS, "window": 1023,
        "sliding": sliding,
    }  # fmt: skip
    return manifest(shapes=shapes, engines={"text": engine(tensors=tensors)}), spec


def test_the_sums_are_those_counted_by_hand() -> None:
    for slots in (1, 2, 9):
        found = engine_memory(*published(), slots)
        assert found.weights == 16_000_000
        # 5 full layers of 2 heads of 512, 25 sliding layers of 8 heads of 256; K and V, 2 bytes each
        assert found.full_kv == slots * 5 * 2 * 32_768 * 2 * 512 * 2
        assert found.sliding_kv == slots * 25 * 2 * (1023 + 2048 + 256) * 8 * 256 * 2
        assert found.activations == 500_000_000  # of the larger range: two contexts never run at once
        soft = 256 * 2816 * 2
        once = 4 * soft + 2048 * 2816 * 2 + 256 * 262_144 * 4 + 16 * 2**20
        inputs = 2 * (2048 + 1024) * ((512 + 256) * 4 + 64) + (32_768 + 2048) * 4 + 65_536
        assert found.inputs_and_outputs == slots * soft + once + inputs
        assert (found.slots, found.context) == (slots, 32_768)
        assert found.total == sum(found.items().values())
        assert len(found.items()) == 5


@pytest.mark.parametrize(("slots", "context", "chunk", "canvases"), [(4, 32_768, 2048, 4), (1, 8192, 512, 1)])
def test_the_planner_counts_the_same(slots: int, context: int, chunk: int, canvases: int) -> None:
    """Before a build and before a load; but for small tensors, which begin at addresses of their own."""
    shapes = engine_shapes(PUBLISHED, slots, context, chunk, canvases)
    on = Deployment(PUBLISHED, {}, 0, "dense", 0, 0)
    planned = vram_budget(on, shapes)
    made, spec = published(context, chunk=chunk, canvases=canvases)
    found = engine_memory(made, spec, slots)
    assert (found.full_kv, found.sliding_kv) == (planned.full_kv_bytes, planned.sliding_kv_bytes)
    assert found.inputs_and_outputs == planned.io_bytes + 65_536


def test_float32_takes_twice_the_bytes() -> None:
    half, whole = (engine_memory(*published(width=width), 2) for width in ("bf16", "float"))
    assert (whole.full_kv, whole.sliding_kv) == (2 * half.full_kv, 2 * half.sliding_kv)
    assert whole.weights == half.weights


def test_a_plan_that_does_not_tell_its_activations_counts_none() -> None:
    made, spec = published()
    text = made.engines["text"]
    untold = text.model_copy(update={"build": text.build.model_copy(update={"reserved": None})})
    assert engine_memory(made.model_copy(update={"engines": {"text": untold}}), spec, 4).activations == 0


def test_the_buffers_of_a_slot_are_k_and_v_as_the_engine_has_them_and_the_soft_embeddings() -> None:
    made, spec = published(layers=6)
    expected = [
        Buffer(f"{name}.{index}", *(("full", 2, 32_768, 1024) if index == 5 else ("sliding", 8, SLIDING_ROWS, 512)))
        for index in range(6) for name in ("k", "v")
    ]  # fmt: skip
    assert slot_buffers(made, spec) == [*expected, Buffer("soft", "soft", 1, 256, 5632)]


@pytest.mark.parametrize("slots", [1, 3])
def test_the_slots_memory_takes_what_was_counted_for_it(slots: int) -> None:
    taken: list[int] = []

    class Counting:
        def allocate(self, nbytes: int) -> int:
            taken.append(nbytes)
            return 0

        def clear(self, address: int, nbytes: int) -> None:
            pass

    made, spec = published()
    KvMemory(Counting(), slot_buffers(made, spec), slots)
    needed = engine_memory(made, spec, slots)
    assert sum(taken) == slots * needed.per_slot + EXCHANGE_BYTES
    assert slots * needed.per_slot == needed.full_kv + needed.sliding_kv + slots * CANVAS * HIDDEN * 2


def test_a_type_of_a_newer_version_is_named() -> None:
    tensor = EngineTensor(name="k.7", mode="input", dtype="fp6", shape=(1, 2))
    with pytest.raises(BundleError, match=r"the engine's k\.7 is fp6, which this version can't make: upgrade it"):
        element_bytes(tensor)
    with pytest.raises(BundleError, match=r"k\.0.* is fp8"):
        engine_memory(*published(width="fp8"), 1)
    kinds = ("bf16", "float", "int32", "bool")
    assert [element_bytes(tensor.model_copy(update={"dtype": kind})) for kind in kinds] == [2, 4, 4, 1]


def test_a_bundle_without_a_text_engine_is_refused() -> None:
    made, spec = published()
    without = made.model_copy(update={"engines": {}})
    for asks in (lambda: text_engine(without), lambda: engine_memory(without, spec, 1)):
        with pytest.raises(BundleError, match="the bundle has no text engine: build it again"):
            asks()


# Where there is too little


def advised(message: str, pattern: str) -> int | None:
    found = re.search(pattern, message)
    return int(found[1]) if found else None


@given(st.integers(CANVASES, 12), st.floats(0, 1, exclude_max=True))
def test_the_slots_that_are_advised_fit_and_one_more_does_not(slots: int, share: float) -> None:
    made, spec = published()
    needed = engine_memory(made, spec, slots)
    free = int(needed.total * share)
    fitting = advised(shortage(needed, free, 32 * GB, "a GPU"), r"slots=(\d+) \(no build needed\)")
    if fitting is not None:
        assert CANVASES <= fitting < slots  # a runner refuses fewer slots than canvases
        assert engine_memory(made, spec, fitting).total <= free
    assert engine_memory(made, spec, (fitting or CANVASES - 1) + 1).total > free


@given(st.integers(1, 12), st.integers(300, 131_072), st.floats(0, 1, exclude_max=True))
def test_the_context_that_is_advised_fits_and_one_token_more_does_not(slots: int, context: int, share: float) -> None:
    made, spec = published(context)
    needed = engine_memory(made, spec, slots)
    free = int(needed.total * share)
    shorter = advised(shortage(needed, free, 32 * GB, "a GPU"), r"--context (\d+) or less")
    if shorter is None:
        assert engine_memory(*published(max(1, context // 8)), slots).total > free
    else:
        assert context // 8 <= shorter < context
        assert engine_memory(*published(shorter), slots).total <= free
        assert engine_memory(*published(shorter + 1), slots).total > free


def test_what_just_fits_is_no_shortage_and_one_byte_less_is() -> None:
    needed = engine_memory(*published(), 4)
    check_memory(needed, needed.total, 32 * GB, "a GPU")
    with pytest.raises(CapacityError) as error:
        check_memory(needed, needed.total - 1, 32 * GB, "a GPU")
    assert str(error.value) == shortage(needed, needed.total - 1, 32 * GB, "a GPU")


def test_the_message_has_the_parts_and_every_way_out() -> None:
    needed = EngineMemory(
        weights=15 * GB, full_kv=4 * GB, sliding_kv=2 * GB, activations=GB, inputs_and_outputs=GB // 2,
        per_slot=3 * GB // 2, slots=4, least_slots=1, context=32_000,
    )  # fmt: skip
    assert shortage(needed, 21 * GB, 24 * GB, "NVIDIA L4") == (
        "NVIDIA L4 has 21.00 of 24.00 GB free, and this bundle with 4 slots of 32000 tokens needs 22.50 GB: weights "
        "15.00, K/V of full layers 4.00, K/V of sliding layers 2.00, activations 1.00, inputs and outputs 0.50. Either "
        "serve it with slots=3 (no build needed), or build it again with --context 20000 or less, or build it again "
        "with fewer --canvases, a smaller --chunk or a smaller recipe (canvasrt plan), or end what else uses the GPU: "
        "3.00 GB are taken (nvidia-smi)"
    )


def test_ways_that_lead_nowhere_are_not_advised() -> None:
    needed = EngineMemory(15 * GB, 4 * GB, 2 * GB, GB, GB // 2, 3 * GB // 2, 4, 1, 32_000)
    message = shortage(needed, 10 * GB, 10 * GB + GB // 2, "a small GPU")
    assert "slots=" not in message
    assert "--context" not in message
    assert "nvidia-smi" not in message
    assert "Either build it again with fewer --canvases" in message
    canvases = replace(needed, least_slots=4)
    assert "slots=" in shortage(needed, 21 * GB, 21 * GB, "a GPU")
    assert "slots=" not in shortage(canvases, 21 * GB, 21 * GB, "a GPU")

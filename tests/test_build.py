"""What ``canvasrt build`` makes of the demo checkpoint for every RTX profile and in every format, read back."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tensorrt_rtx
from safetensors.torch import load_file

import canvasrt
from builds import CAPABILITIES, Builds, Built, option_of, plain_values
from canvasrt.bundle.manifest import Manifest
from canvasrt.checkpoint import Checkpoint
from canvasrt.compile.plan_text import read_plan_text
from canvasrt.engine_weights import EngineWeight, Part, made
from canvasrt.profiles.profile import load_profile
from engine_bytes import expected_matrix, faults, matrices, names_in, needed_tensors, rebuilt, stretches
from engine_tables import EMBEDDING, ROWS, Numbers, expected_ranges, expected_tensors, layers_of
from layouts import LAYOUTS

STRIPPED, DENSE = ("--weights", "stripped"), ("--moe", "dense")
NAMES = {
    "nvfp4-experts": "NVFP4 (modelopt)", "nvfp4": "NVFP4 (modelopt)", "w4a16-nvfp4": "NVFP4 (modelopt)",
    "fp8": "FP8 (modelopt)", "fp8-dynamic": "FP8 (compressed-tensors)", "int4-experts": "INT4 (canvasrt)",
    "own-int4": "INT4 (canvasrt)",
    "demo": "none", "tiny": "none",
}  # fmt: skip
PACKED = {"int4-experts": "int4", "own-int4": "int4", "fp8": "fp8_e4m3", "fp8-dynamic": "fp8_e4m3"}  # else fp4_e2m1
MODEL_FILES = (
    "config.json", "generation_config.json", "hf_quant_config.json", "tokenizer.json", "tokenizer_config.json",
    "chat_template.jinja",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    checkpoint: str
    profile: str
    options: tuple[str, ...] = ()

    def __str__(self) -> str:
        return " ".join([self.checkpoint, self.profile, *self.options])

    def built(self, builds: Builds) -> Built:
        return builds.bundle(self.checkpoint, self.profile, *self.options)

    @property
    def layout(self) -> str:
        return self.checkpoint.removeprefix("tiny-")

    @property
    def stripped(self) -> bool:
        return "stripped" in self.options

    def numbers(self, positions: int) -> Numbers:
        choices = load_profile(self.profile).choices
        context = min(choices.context.value, positions)
        moe = choices.moe.value
        capacity = (moe.encoder_capacity or 0, moe.decoder_capacity or 0)
        return Numbers(
            choices.slots.value, context, min(choices.chunk.value, context), choices.canvases.value,
            None if "dense" in self.options or moe.formulation == "dense" else capacity,
        )  # fmt: skip


CASES = [
    Case("own-int4", "rtx-4090"),
    Case("int4-experts", "rtx-4090", STRIPPED),
    Case("fp8", "rtx-4090"),
    Case("fp8", "l40s"),
    Case("fp8", "l40s", STRIPPED),
    Case("nvfp4-experts", "rtx-5090"),
    Case("nvfp4-experts", "rtx-5090", STRIPPED),
    Case("nvfp4-experts", "rtx-pro-6000"),
    Case("tiny-nvfp4-experts", "rtx-pro-6000", STRIPPED),
    Case("nvfp4-experts", "dgx-spark"),
    Case("tiny-nvfp4-experts", "dgx-spark", STRIPPED),
    Case("demo", "rtx-5090"),
    Case("demo", "rtx-4090", STRIPPED),
    Case("fp8-dynamic", "l40s"),
    Case("tiny-fp8-dynamic", "l40s", STRIPPED),
    Case("w4a16-nvfp4", "rtx-5090"),
    Case("nvfp4", "rtx-5090"),
    Case("nvfp4-experts", "rtx-5090", DENSE),
    Case("fp8", "l40s", DENSE),
]
EVERY = pytest.mark.parametrize("case", CASES, ids=str)
QUANTIZED = pytest.mark.parametrize("case", [case for case in CASES if case.layout != "demo"], ids=str)
INSIDE = pytest.mark.parametrize("case", [case for case in CASES if not case.stripped], ids=str)
WITHOUT = pytest.mark.parametrize("case", [case for case in CASES if case.stripped], ids=str)


@EVERY
def test_the_manifest_says_what_was_built_from_what_for_what(builds: Builds, case: Case) -> None:
    built = case.built(builds)
    manifest = built.open().manifest  # every byte verified
    capability = CAPABILITIES[case.profile]
    assert (manifest.target.profile, manifest.target.compute_capability) == (case.profile, capability)
    assert (manifest.compiler.name, manifest.compiler.version) == ("tensorrt-rtx", tensorrt_rtx.__version__)
    assert manifest.canvasrt == canvasrt.__version__
    assert manifest.weights == (option_of(case.options, "--weights") or "inside")
    assert manifest.options == ({"moe": "dense"} if "dense" in case.options else {})
    assert (manifest.precision, manifest.kv_type) == ("bf16", "bf16")
    assert (manifest.checkpoint.folder, manifest.checkpoint.quantization) == (built.checkpoint.name, NAMES[case.layout])
    assert manifest.plan["checkpoint"] == str(built.checkpoint)
    assert manifest.profile["name"] == case.profile
    config = json.loads((built.checkpoint / "config.json").read_text())
    text = config["text_config"]
    assert manifest.model == {
        "layers": text["num_hidden_layers"], "hidden_size": text["hidden_size"], "experts": text["num_experts"],
        "vocab_size": text["vocab_size"], "canvas_length": config["canvas_length"],
    }  # fmt: skip
    assert built.printed == {
        "bundle": str(built.path), "built": True, "plan_bytes": len(built.plan),
        "seconds": manifest.engines["text"].build.seconds, "compute_capability": capability,
        "peak_ram_bytes": manifest.engines["text"].build.peak_ram_bytes,
        "compiler": f"tensorrt-rtx {tensorrt_rtx.__version__}", "weights": manifest.weights,
    }  # fmt: skip
    assert built.said == ""


@EVERY
def test_tensors_and_shape_ranges_are_those_of_the_configuration(builds: Builds, case: Case) -> None:
    built = case.built(builds)
    config = json.loads((built.checkpoint / "config.json").read_text())
    numbers = case.numbers(config["text_config"]["max_position_embeddings"])
    manifest = built.open().manifest
    engine = manifest.engines["text"]
    found = {each.name: (each.mode, each.dtype, each.shape, each.aliases) for each in engine.tensors}
    assert found == expected_tensors(config, numbers)
    ranges = {
        name: {tensor: (each.min, each.opt, each.max) for tensor, each in inputs.items()}
        for name, inputs in engine.shape_ranges.items()
    }
    assert ranges == expected_ranges(config, numbers)
    assert list(ranges) == ["encoder", "decoder"]  # in the order of the plan's profiles
    shapes = manifest.shapes
    assert (shapes.slots, shapes.context, shapes.chunk, shapes.canvases) == (
        numbers.slots, numbers.context, numbers.chunk, numbers.canvases,
    )  # fmt: skip
    assert shapes.window == config["text_config"]["sliding_window"] - 1
    assert manifest.moe.formulation == ("dense" if numbers.capacity is None else "capacity")
    capacity = (manifest.moe.encoder_capacity, manifest.moe.decoder_capacity)
    assert capacity == (numbers.capacity or (None, None))


@EVERY
def test_the_plan_is_for_that_gpu_and_its_memory_is_in_the_manifest(builds: Builds, case: Case) -> None:
    built = case.built(builds)
    engine = built.open().manifest.engines["text"]
    plan = built.plan
    wanted = b"sm" + CAPABILITIES[case.profile].replace(".", "").encode()
    assert wanted in plan
    assert not any(name in plan for name in {b"sm89", b"sm120", b"sm121"} - {wanted} if name not in wanted)
    text = read_plan_text(plan)
    names = list(engine.shape_ranges)
    reserved = [(names[each.shape_range], each.name, each.nbytes) for each in text.regions()]
    assert [(each.shape_range, each.name, each.nbytes) for each in engine.build.reserved or ()] == reserved
    assert {name for name, _, _ in reserved} == {"encoder", "decoder"}
    layers = layers_of(json.loads((built.checkpoint / "config.json").read_text()))
    counts = engine.build.layers
    assert (counts["KV_CACHE_UPDATE"], counts["ATTENTION_INPUT"]) == (2 * len(layers), len(layers))
    assert 0 < engine.build.seconds < 600
    assert 10**8 < (engine.build.peak_ram_bytes or 0) < 4 * 10**9


@EVERY
def test_every_choice_has_its_reason_and_the_log_holds_it(builds: Builds, case: Case) -> None:
    built = case.built(builds)
    manifest = built.open().manifest
    choices = load_profile(case.profile).choices
    found = {each.what: (each.value, each.reason) for each in manifest.reasons}
    assert list(found) == [
        "weights", "context", "slots", "canvases", "chunk", "K/V", "experts", "compiler", "GPU memory",
    ]  # fmt: skip
    assert found["weights"] == (NAMES[case.layout], "as the checkpoint is stored")
    said = f"all that the model has positions for; the profile says {choices.context.value:,}"
    assert found["context"] == (f"{manifest.shapes.context:,}", said)
    assert found["slots"] == (str(choices.slots.value), choices.slots.reason)
    assert found["canvases"] == (str(choices.canvases.value), choices.canvases.reason)
    assert found["compiler"] == ("tensorrt-rtx", choices.compiler.reason)
    if "dense" in case.options:
        assert found["experts"] == ("dense", "the build plan's moe")
    log = built.open().file(manifest.log).read_text()
    for what, (value, reason) in found.items():
        assert f"{what}: {value}  # {reason}\n" in log
    assert f"messages of tensorrt-rtx {tensorrt_rtx.__version__}\n" in log
    assert "info: Engine generation completed" in log
    assert "error:" not in log
    assert "cudaError" not in log


@EVERY
def test_what_the_serve_side_reads_beside_weights_is_copied(builds: Builds, case: Case) -> None:
    built = case.built(builds)
    manifest = built.open().manifest
    files = {name for name in MODEL_FILES if (built.checkpoint / name).exists()}
    for name in files:
        assert (built.path / name).read_bytes() == (built.checkpoint / name).read_bytes()
    own = {"text.engine", "build.log"} | ({"embedding.bin"} if not case.stripped else set())
    assert set(manifest.files) == files | own
    assert {file.name for file in built.path.iterdir()} == {*files, *own, "manifest.json"}


@EVERY
def test_the_embedding_is_given_as_the_checkpoint_has_it(builds: Builds, case: Case) -> None:
    built = case.built(builds)
    opened = built.open()
    (given,) = opened.manifest.engines["text"].given
    assert (given.name, given.dtype) == (EMBEDDING, "bf16")
    assert not faults(built.checkpoint, [given])
    assert [part.tensor for part in given.parts] == [EMBEDDING]
    whole = rebuilt(built.checkpoint, given)
    assert len(whole) == given.nbytes == 2 * int(np.prod(given.shape))
    assert given.file == (None if case.stripped else "embedding.bin")
    if given.file is not None:
        assert opened.file(given.file).read_bytes() == whole
    plain = plain_values(built.checkpoint)[EMBEDDING]
    assert (np.frombuffer(whole, np.uint16).astype(np.uint32) << 16).view(np.float32).tolist() == plain.ravel().tolist()
    # Never in the plan, where it would lie once more for each shape range and layout.
    width = given.shape[1] * 2
    rows, plan = [whole[start : start + width] for start in range(0, len(whole), width)], built.plan
    assert not any(row in plan for row in rows if any(row))


@QUANTIZED
def test_quantized_weights_take_the_bytes_that_they_have_in_the_checkpoint(builds: Builds, case: Case) -> None:
    """Counted in the plan's own listing, and in the manifest."""
    built = case.built(builds)
    dtype = PACKED.get(case.layout, "fp4_e2m1")
    stored = load_file(built.checkpoint / "model.safetensors")
    packed = sum(each.nbytes for name, each in stored.items() if f"{name}_scale" in stored)
    found = read_plan_text(built.plan).weight_bytes()
    assert found[dtype] == packed
    assert built.open().manifest.engines["text"].build.weight_bytes[dtype.partition("_")[0]] == packed


def own_entries(manifest: Manifest) -> list[EngineWeight]:
    """As a runtime reads them."""
    engine = manifest.engines["text"]
    found = []
    for each in (*engine.weight_map, *engine.given):
        parts = tuple(Part(part.tensor, part.count) for part in each.parts)
        found.append(EngineWeight(each.name, each.dtype, each.shape, parts, each.columns))
    return found


@WITHOUT
def test_a_stripped_plan_can_be_filled_from_its_manifest(builds: Builds, case: Case) -> None:
    built = case.built(builds)
    manifest = built.open().manifest
    engine = manifest.engines["text"]
    entries = [*engine.weight_map, *engine.given]
    assert faults(built.checkpoint, entries) == []
    assert names_in(built.plan) == {each.name for each in engine.weight_map}  # what the plan asks for, no more, no less
    used = Counter(part.tensor for each in entries for part in each.parts)
    assert set(used) == needed_tensors(built.checkpoint)
    assert set(used.values()) == {1}
    formats = Counter[str]()
    checkpoint = Checkpoint.open(built.checkpoint)
    for entry, weight in zip(entries, own_entries(manifest), strict=True):
        content = rebuilt(built.checkpoint, entry)
        assert len(content) == entry.nbytes, entry.name
        assert made(checkpoint, weight).tobytes() == content, entry.name
        formats[entry.dtype] += entry.nbytes
    assert engine.build.weight_bytes == dict(formats)


@WITHOUT
def test_what_fills_a_stripped_plan_means_the_checkpoints_numbers(builds: Builds, case: Case) -> None:
    built = case.built(builds)
    values = builds.export(case.checkpoint).values if case.layout in LAYOUTS else plain_values(built.checkpoint)
    layers = layers_of(json.loads((built.checkpoint / "config.json").read_text()))
    heads = json.loads((built.checkpoint / "config.json").read_text())["text_config"]["num_attention_heads"]
    found = matrices(built.checkpoint, built.open().manifest.engines["text"].weight_map)
    for index, layer in enumerate(layers):
        attention = f"model.decoder.layers.{index}.self_attn"
        norms = [values[f"{attention}.{name}_norm.weight"] for name in ("q", "k")]
        expected = np.repeat(np.stack(norms), [heads, layer.kv_heads], 0)
        assert np.array_equal(found.pop(f"{attention}.qk_norm.fp32"), expected)
    for name, numbers in found.items():
        expected = expected_matrix(name, values)
        # INT4: the engine's scales are BF16.
        error = 2**-8 if "int4" in case.layout and ".experts." in name else 1e-6
        assert np.allclose(numbers.reshape(expected.shape), expected, rtol=error, atol=0), name


@WITHOUT
def test_a_stripped_plan_holds_no_weights(builds: Builds, case: Case) -> None:
    built = case.built(builds)
    large = [each for each in built.open().manifest.engines["text"].weight_map if each.nbytes >= 4096]
    assert large
    plan = built.plan
    for entry in large:
        if not entry.name.endswith((".scale", ".multiplier")):
            lines = stretches(rebuilt(built.checkpoint, entry), entry)
            assert not any(line in plan for line in lines), entry.name


@INSIDE
def test_a_bundle_with_weights_needs_no_checkpoint(builds: Builds, case: Case, tmp_path: Path) -> None:
    manifest = case.built(builds).open().manifest
    assert manifest.engines["text"].weight_map == ()
    assert not manifest.needs_checkpoint
    assert ROWS not in {entry.name for entry in manifest.engines["text"].given}

"""Bundles whose plan is random bytes: for everything that does not run an engine."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from canvasrt.bundle.manifest import Manifest, build_id
from canvasrt.bundle.reader import EngineBundle
from canvasrt.bundle.writer import BundleWriter
from canvasrt.fingerprint import fingerprint

PLAN = np.random.default_rng(0).integers(0, 256, 100_000, np.uint8).tobytes()
LAYERS = 30


def checkpoint(folder: Path, seed: int = 0, rows: int = 64) -> Path:
    """Two small matrices, a configuration and a tokenizer: enough to be copied and recognised."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = np.random.default_rng(seed)
    tensors = {name: numbers.random((rows, 32), np.float32) for name in ("a.weight", "b.weight")}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "diffusion_gemma", "rows": rows}))
    (folder / "generation_config.json").write_text('{"eos_token_id": 1}')
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def tensors(layers: int = LAYERS) -> list[dict[str, Any]]:
    cache = [
        {"name": f"{kind}_{mode}_{layer}", "mode": mode, "dtype": "bfloat16", "shape": [4, 8, 1536, 256],
         "aliases": f"{kind}_input_{layer}" if mode == "output" else None}
        for mode in ("input", "output") for layer in range(layers) for kind in ("key", "value")
    ]  # fmt: skip
    tokens = {"name": "tokens", "mode": "input", "dtype": "int32", "shape": [-1, -1], "aliases": None}
    entropy = {"name": "entropy", "mode": "output", "dtype": "float32", "shape": [-1], "aliases": None}
    return [tokens, *cache, entropy]


def engine(**changes: Any) -> dict[str, Any]:
    def range_of(most: list[int]) -> dict[str, Any]:
        return {"tokens": {"min": [1, 1], "opt": most, "max": most}}

    facts = {
        "seconds": 85.2, "peak_ram_bytes": 1_800_000_000, "layers": {"MATRIX_MULTIPLY": 211, "CONSTANT": 640},
        "weight_bytes": {"nvfp4": 14_000_000, "bf16": 2_000_000},
        "reserved": [
            {"shape_range": "encoder", "name": "devmem_topdown_0", "nbytes": 400_000_000},
            {"shape_range": "encoder", "name": "devmem_topdown_1", "nbytes": 100_000_000},
            {"shape_range": "decoder", "name": "devmem_topdown_0", "nbytes": 46_000_000},
        ],
    }  # fmt: skip
    whole = {
        "file": "text.engine", "shape_ranges": {"encoder": range_of([1, 2048]), "decoder": range_of([4, 256])},
        "tensors": tensors(), "build": facts, "weight_map": [],
    }  # fmt: skip
    return whole | changes


def content(source: Path | None = None, **changes: Any) -> dict[str, Any]:
    """A manifest as JSON would hold it, before BundleWriter completes it; ``source`` is the checkpoint."""
    print_ = fingerprint(source) if source is not None else None
    whole: dict[str, Any] = {
        "format_version": 1, "build_id": "b" * 64, "canvasrt": "0.1.0",
        "compiler": {"name": "tensorrt-rtx", "version": "1.7.1.116"},
        "target": {"compute_capability": "12.0", "profile": "rtx-5090"},
        "checkpoint": {
            "folder": source.name if source else "dg-nvfp4", "quantization": "NVFP4 (modelopt)",
            "layout": print_.layout if print_ else "1" * 64, "content": print_.content if print_ else "2" * 64,
        },
        "weights": "inside", "options": {}, "precision": "nvfp4", "kv_type": "bf16",
        "shapes": {"slots": 4, "context": 32_768, "chunk": 2048, "canvases": 4, "canvas": 256, "window": 1023,
                   "sliding": 3327},
        "moe": {"formulation": "dense", "encoder_capacity": None, "decoder_capacity": None},
        "model": {"layers": LAYERS, "hidden_size": 2816},
        "reasons": [{"what": "moe", "value": "dense", "reason": "1 canvas, 32 GB/s per TFLOP: weight-bound"}],
        "profile": {"name": "rtx-5090"}, "plan": {"slots": 4}, "log": "build.log", "engines": {"text": engine()},
    }  # fmt: skip
    return whole | changes


def weight_map(source: Path) -> list[dict[str, Any]]:
    part = {"file": "model.safetensors", "offset": 200, "nbytes": 8192, "tensor": "a.weight", "count": 1}
    assert (source / part["file"]).exists()
    return [{"name": "layer.0.weight", "dtype": "fp32", "shape": [64, 32], "nbytes": 8192, "transform": "copy",
             "parts": [part]}]  # fmt: skip


def manifest(source: Path | None = None, **changes: Any) -> Manifest:
    whole = content(source, **changes)
    made = Manifest.model_validate_json(json.dumps(whole))
    ident = build_id(
        canvasrt=made.canvasrt, compiler=made.compiler, target=made.target, checkpoint=made.checkpoint,
        profile=made.profile, plan=made.plan, weights=made.weights, options=made.options,
    )  # fmt: skip
    return made.model_copy(update={"build_id": ident})


def write(target: Path, source: Path, *, force: bool = False, plan: bytes = PLAN, **changes: Any) -> Manifest:
    """A whole bundle, as the builder writes one."""
    with BundleWriter(target, force=force) as bundle:
        bundle.copy_model_files(source)
        bundle.write("build.log", b"built\n")
        with bundle.create("text.engine") as file:
            for start in range(0, len(plan), 30_000):
                file.sink(plan[start : start + 30_000])
        return bundle.finish(manifest(source, **changes))


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def plan_of(target: Path) -> bytes | None:
    """Of the bundle that stands there, all of it verified; None without one."""
    return bytes(EngineBundle.open(target).engine("text")) if target.exists() else None

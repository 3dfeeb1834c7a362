"""One quantization from source to finished checkpoint: checked first, resumable after calibration, renamed at the end.

Everything is written to OUT.partial beside OUT and renamed when it is complete and has been read back, so that nothing
half-written ever carries the final name. A calibration that has run is kept there until then.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import safetensors
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from canvasrt.checkpoint import Checkpoint
from canvasrt.errors import CanvasRTError, CapacityError, CheckpointError, InputError
from canvasrt.inputs import input_folder
from canvasrt.quantize.recipe import Calibration, Recipe
from canvasrt.serve.prompts import PromptLine, encode_prompts, read_prompts
from canvasrt.tensorfile import read_folder

_WEIGHT_FILES = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth", ".gguf")
_OWN_FILES = ("config.json", "hf_quant_config.json", "README.md", "quality.json", "quality.md")


class Progress(Protocol):
    """Told of every stage and every unit of work in it."""

    def stage(self, name: str, total: int) -> None: ...
    def advance(self) -> None: ...


class QuantizeJob:
    """Raises InputError and CheckpointError for what can't work before anything is loaded or written."""

    def __init__(
        self, source: Checkpoint, recipe: Recipe, out: Path, calibration: Path | None, samples: int | None, device: str
    ) -> None:
        check_source(source, recipe)
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise InputError(f"{out} exists and is not empty: name another folder, or remove it first")
        if out.resolve().is_relative_to(source.folder.resolve()):
            raise InputError(f"{out} lies in the source checkpoint {source.folder}: name a folder outside it")
        if device == "cuda" and not torch.cuda.is_available():
            raise InputError("device cuda was asked for, but torch sees no NVIDIA GPU: check the driver, or use cpu")
        self._source, self._recipe, self._device = source, recipe, device
        self._out = out
        self._partial = out.with_name(out.name + ".partial")
        self._settings, self._prompts = _prompts(source, recipe, calibration, samples)

    def run(self, progress: Progress) -> Checkpoint:
        """The finished checkpoint at ``out``. Raises CapacityError when the disk is full."""
        with _disk_errors(self._out):
            self._out.parent.mkdir(parents=True, exist_ok=True)
            self._partial.mkdir(exist_ok=True)
            export = self._partial / "export"
            shutil.rmtree(export, ignore_errors=True)  # of an interrupted run
            self._export(export, progress)
            progress.stage("check", 1)
            _complete(self._source, export)
            _check(self._source, self._recipe, Checkpoint.open(export), export)
            if self._out.exists():
                self._out.rmdir()
            export.rename(self._out)
            shutil.rmtree(self._partial)
            progress.advance()
        return Checkpoint.open(self._out)

    def _export(self, folder: Path, progress: Progress) -> None:
        if self._recipe.weights == "int4":
            from canvasrt.quantize.int4 import export_int4

            progress.stage("pack", len(read_folder(self._source.folder)))
            export_int4(self._source, self._recipe, folder, progress.advance)
            return
        from canvasrt.quantize.modelopt_model import QuantizedModel

        progress.stage("load", 1)
        model = QuantizedModel(self._source, self._recipe, self._device)
        progress.advance()
        kept = self._partial / "calibration.safetensors"
        fingerprint = self._fingerprint()
        scales = _kept_scales(kept, fingerprint)
        if scales is not None:
            model.restore(scales)
        elif self._settings is None:
            model.restore({})
        else:
            progress.stage("calibrate", len(self._prompts))
            scales = model.calibrate(self._prompts, self._settings, progress.advance)
            # Renamed when whole: half a file of scales must not be taken for a calibration.
            save_file(scales, kept.with_suffix(".tmp"), metadata={"fingerprint": fingerprint})
            os.replace(kept.with_suffix(".tmp"), kept)
        progress.stage("export", 1)
        model.export(folder)
        progress.advance()

    def _fingerprint(self) -> str:
        """Of all that a calibration depends on: the source's files by size and time, the recipe and the prompts."""
        tensors = read_folder(self._source.folder).values()
        files = {str(info.file.resolve()): info.file.stat() for info in tensors}
        content = [
            (self._source.folder / "config.json").read_text(encoding="utf-8"),
            sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in files.items()),
            self._recipe.model_dump(mode="json"),
            [prompt.tolist() for prompt in self._prompts],
            None if self._settings is None else self._settings.model_dump(),
        ]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def check_source(source: Checkpoint, recipe: Recipe) -> None:
    """Raises InputError for a checkpoint that this recipe can't start from."""
    if source.quantization is not None:
        raise InputError(
            f"{source.folder} is quantized already, as {source.quantization.name}: start from the BF16 checkpoint"
        )
    recipe.check(source.spec)


def calibration_lines(source: Checkpoint, recipe: Recipe, file: Path | None, samples: int | None) -> list[PromptLine]:
    """The prompts that calibrate: none for weights alone. Raises InputError for a file that holds no prompts."""
    settings = recipe.calibration
    if settings is None:
        return []
    own = source.folder / "calibration.jsonl"  # of a checkpoint whose prompts are unlike everybody's
    path = file or (own if own.exists() else input_folder("calibration") / settings.file)
    return read_prompts(path)[: samples or settings.samples]


def _prompts(
    source: Checkpoint, recipe: Recipe, file: Path | None, samples: int | None
) -> tuple[Calibration | None, list[NDArray[np.int32]]]:
    settings = recipe.calibration
    lines = calibration_lines(source, recipe, file, samples)
    if settings is None:
        return None, []
    return settings, encode_prompts(source.folder, source.spec, lines, settings.canvases * source.spec.canvas_length)


def _kept_scales(file: Path, fingerprint: str) -> dict[str, torch.Tensor] | None:
    if not file.exists():
        return None
    try:
        with safetensors.safe_open(file, "pt") as content:
            if (content.metadata() or {}).get("fingerprint") != fingerprint:
                return None  # of another recipe, source or prompts
        return load_file(file)
    except safetensors.SafetensorError:
        return None  # damaged: calibrating again costs time, a wrong scale would cost the checkpoint


def _complete(source: Checkpoint, folder: Path) -> None:
    """Makes an export deployable: the source's configuration with the quantization added, tokenizer, templates."""
    exported = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = json.loads((source.folder / "config.json").read_text(encoding="utf-8"))
    # transformers 5.23 writes a config.json that has lost dimensions of the full layers: the source's is kept.
    config["quantization_config"] = exported["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for file in source.folder.iterdir():
        skipped = file.name.startswith(".") or file.name in _OWN_FILES or file.name.endswith(_WEIGHT_FILES)
        if file.is_file() and not skipped:
            shutil.copyfile(file, folder / file.name)


def _check(source: Checkpoint, recipe: Recipe, made: Checkpoint, folder: Path) -> None:
    """Raises CheckpointError unless exactly what the recipe names is quantized, in its format, and nothing is lost."""
    for name in made.names():
        expected = recipe.format if recipe.covers(name) else source.stored(name).format
        found = made.stored(name).format
        if found != expected:
            raise CheckpointError(
                f"recipe {recipe.name} asks for {expected.weights} in {name}, and the export holds {found.weights}: "
                "the recipe's modelopt entry and its tensors do not say the same"
            )
    written = read_folder(folder)
    lost = [name for name in read_folder(source.folder) if name not in written and name not in source.names()]
    if lost:
        raise CheckpointError(f"the export lacks {len(lost)} tensors of the source, such as {lost[0]}")
    kv = made.quantization.kv_cache if made.quantization else None
    if kv != (None if recipe.kv_cache == "bf16" else recipe.kv_cache):
        raise CheckpointError(f"recipe {recipe.name} asks for a K/V cache in {recipe.kv_cache}, the export has {kv}")


@contextlib.contextmanager
def _disk_errors(out: Path) -> Iterator[None]:
    try:
        yield
    except CanvasRTError:
        raise
    except (OSError, safetensors.SafetensorError) as error:
        number = error.errno if isinstance(error, OSError) else None
        full = ("No space left", "File too large", "quota exceeded")
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or any(sign in str(error) for sign in full):
            free = shutil.disk_usage(out.parent).free
            raise CapacityError(
                f"the disk of {out.parent} is full ({free / 1e9:.1f} GB free): make room and run the same command "
                "again; calibration is kept"
            ) from None
        raise InputError(f"can't write {out}: {error}") from None

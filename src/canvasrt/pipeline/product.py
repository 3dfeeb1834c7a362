"""Which folders a pipeline leads to. Looks at no disk but for a recipe's or profile's own file."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from canvasrt.pipeline.settings import Pipeline, Source, parse_source

_DIGITS = 8  # of a hash in a folder's name


@dataclass(frozen=True, slots=True)
class Product:
    """What a server is given: ``checkpoint`` for a bundle without weights, ``kernels`` a file, both else None."""

    model: Path
    checkpoint: Path | None
    kernels: Path | None


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything lies: ``checkpoint`` as it was published, ``quantized`` and ``bundle`` where there are any."""

    checkpoint: Path | None
    quantized: Path | None
    bundle: Path | None
    kernels: Path | None

    @property
    def weights(self) -> Path | None:
        """The checkpoint that is served or built from."""
        return self.quantized or self.checkpoint


def layout(pipeline: Pipeline) -> Layout:
    """Raises InputError for a profile that is not there."""
    compiler = pipeline.gpu_profile().choices.compiler.value
    checkpoint = quantized = bundle = kernels = None
    if pipeline.checkpoint is not None:
        source = parse_source(pipeline.checkpoint.source)
        name = f"{source.label}-{source_digits(pipeline, source)}"
        in_place = source.scheme == "folder"
        checkpoint = Path(source.place) if in_place else pipeline.folder / "checkpoints" / name
        if pipeline.quantize is not None:
            made = pipeline.quantize
            samples = "" if made.samples is None else f"-{made.samples}"
            quantized = pipeline.folder / "checkpoints" / f"{name}-{_recipe_label(made.recipe)}{samples}"
    if compiler != "torch" and pipeline.bundle is not None:
        bundle = pipeline.folder / "engines" / pipeline.bundle.name
        if pipeline.kernels is not None and compiler == "tensorrt-rtx":
            kernels = Path(pipeline.kernels) / f"{pipeline.bundle.name}.kernels"
    return Layout(checkpoint, quantized, bundle, kernels)


def resolve(pipeline: Pipeline) -> Product:
    """What is served when all is made. Raises InputError for a profile that is not there."""
    places = layout(pipeline)
    if places.bundle is None:
        assert places.weights is not None  # load_pipeline refuses a pipeline without either
        return Product(places.weights, None, None)
    stripped = pipeline.bundle is not None and pipeline.bundle.weights == "stripped"
    return Product(places.bundle, places.weights if stripped else None, places.kernels)


def source_digits(pipeline: Pipeline, source: Source) -> str:
    """Tells sources apart whose names for people are the same."""
    where = str(Path(source.place).absolute()) if source.scheme == "folder" else source.text
    return _digits(f"{where} {pipeline.s3.endpoint}" if source.scheme == "s3" else where)


def _recipe_label(recipe: str) -> str:
    file = Path(recipe)
    own = file.suffix in (".yaml", ".yml")
    return f"{re.sub(r'[^A-Za-z0-9._-]', '-', file.stem)}-{_digits(str(file.absolute()))}" if own else recipe


def _digits(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]

"""The only importer of ModelOpt: its quantizers inserted into transformers' model, calibrated, and written out.

Everything goes through its public API (``mtq.quantize``, ``load_recipe``, ``export_hf_checkpoint``) but INT4, which
ModelOpt 0.47 can calibrate and not export for this model: canvasrt.quantize.int4 writes it with ModelOpt's packing.
"""

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from canvasrt.checkpoint import Checkpoint
from canvasrt.errors import InputError
from canvasrt.quantize.recipe import Calibration, Part, Recipe, WeightFormat
from canvasrt.reference.model import ReferenceModel

with warnings.catch_warnings():
    # ModelOpt warns of every transformers newer than its own tests; this project pins and tests the pair.
    warnings.simplefilter("ignore")
    import modelopt.torch.quantization as mtq
    from modelopt.recipe import load_recipe
    from modelopt.torch.export import export_hf_checkpoint
    from modelopt.torch.export.quant_utils import pack_int4_in_uint8
    from modelopt.torch.quantization.config import QuantizerAttributeConfig
    from modelopt.torch.quantization.nn import TensorQuantizer

Tensor = torch.Tensor
INT4_MAX = 7.0  # the largest weight of a block is mapped to it; -8 stays unused
Prompts = Sequence[NDArray[np.int32]]

_E4M3, _E2M1 = (4, 3), (2, 1)  # exponent and mantissa bits, as ModelOpt writes them
_PATTERNS: dict[Part, str] = {"experts": "*.experts.*", "attention": "*.self_attn.*", "mlp": "*.mlp.*"}
# Never quantized. Without data the self-conditioning block would get a meaningless scale, without an error.
_KEPT = ("*self_conditioning*", "*router*", "*lm_head*", "*embed_tokens*", "*vision_tower*", "*embed_vision*")


def quantizer_config(recipe: Recipe) -> dict[str, Any]:
    """The recipe in ModelOpt's words: an ordered list of patterns, later ones win.

    Raises InputError for a recipe of ModelOpt's that it does not know.
    """
    if recipe.modelopt is not None:
        try:
            config: dict[str, Any] = load_recipe(recipe.modelopt).quantize.model_dump()
        except (OSError, ValueError) as error:
            raise InputError(
                f"recipe {recipe.name}: nvidia-modelopt has no recipe {recipe.modelopt!r}: {error}"
            ) from None
        return config
    rules: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    sides = ["weight_quantizer"] + ["input_quantizer"] * (recipe.format.activations != "none")
    for part in recipe.tensors:
        for side in sides:
            numbers = _numbers(recipe.weights)
            rules.append({"quantizer_name": f"{_PATTERNS[part]}{side}", "cfg": numbers, "enable": True})
    if recipe.kv_cache == "fp8":
        cast = {"num_bits": _E4M3, "use_constant_amax": True}
        rules.append({"quantizer_name": "*[kv]_bmm_quantizer", "cfg": cast, "enable": True})
    rules += [{"quantizer_name": pattern, "enable": False} for pattern in _KEPT]
    return {"quant_cfg": rules, "algorithm": recipe.algorithm}


def _numbers(weights: WeightFormat) -> dict[str, Any]:
    if weights == "fp8":
        return {"num_bits": _E4M3}
    return {"num_bits": _E2M1, "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": _E4M3}}


def pack_int4(weight: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """A float32 matrix (out, in) as ModelOpt packs it: U8 (out / 2, in), and float32 scales (out, in / block)."""
    quantizer = TensorQuantizer(QuantizerAttributeConfig(num_bits=4, block_sizes={-1: block}))
    quantizer.disable_quant()
    quantizer.enable_calib()
    quantizer(weight)
    quantizer.load_calib_amax()
    largest = quantizer.amax.view(len(weight), -1)
    scale = torch.where(largest == 0, 1.0, largest / INT4_MAX)  # a block of zeros: any scale, but no division by 0
    return pack_int4_in_uint8(weight, scale, block), scale


class QuantizedModel:
    """transformers' model of a checkpoint in BF16 with ModelOpt's quantizers in it."""

    def __init__(self, checkpoint: Checkpoint, recipe: Recipe, device: str) -> None:
        """Loads the whole model. Raises CheckpointError for one that transformers can't load."""
        self._recipe = recipe
        self._device = device
        self.model: Any = ReferenceModel.load(checkpoint, torch.bfloat16).model.to(device)
        # The exporter looks at it, and checkpoints may lack it.
        self.model.config.architectures = self.model.config.architectures or [type(self.model).__name__]

    def calibrate(self, prompts: Prompts, settings: Calibration, advance: Callable[[], None]) -> dict[str, Tensor]:
        """Inserts quantizers and answers the prompts; the largest activations that each saw, by its name.

        The canvas loop is transformers' own: encoder, denoising with self-conditioning, finished canvases encoded.
        """

        def loop(model: Any) -> None:
            for index, prompt in enumerate(prompts):
                torch.manual_seed(index)  # noise: the same prompts give the same scales
                _answer(model, prompt, settings, self._device)
                advance()

        self._insert(loop)
        return {name: quantizer.amax.detach().cpu().clone() for name, quantizer in self._quantizers()}

    def restore(self, amaxes: dict[str, Tensor]) -> None:
        """Inserts quantizers with the result of an earlier calibration, or none for weights alone."""
        self._insert(None)
        for name, quantizer in self._quantizers(inserted=True):
            if name in amaxes:
                quantizer.amax = amaxes[name].to(self._device)

    def export(self, folder: Path) -> None:
        """Writes weights, config.json and hf_quant_config.json as ModelOpt lays them out."""
        export_quietly(self.model, folder, torch.bfloat16)

    def _insert(self, loop: Callable[[Any], None] | None) -> None:
        with _quiet():
            self.model = mtq.quantize(self.model, quantizer_config(self._recipe), forward_loop=loop)

    def _quantizers(self, inserted: bool = False) -> Iterator[tuple[str, Any]]:
        """Quantizers by name that are enabled and, unless just ``inserted``, hold a largest value."""
        for name, module in self.model.named_modules():
            if isinstance(module, TensorQuantizer) and module.is_enabled:
                constant = getattr(module, "_use_constant_amax", False)
                if not constant and (inserted or getattr(module, "_amax", None) is not None):
                    yield name, module


def export_quietly(model: Any, folder: Path, dtype: torch.dtype) -> None:
    """``dtype`` is that of the tensors that are not quantized, and of the arithmetic that quantizes."""
    with _quiet():
        export_hf_checkpoint(model, dtype=dtype, export_dir=folder)


def _answer(model: Any, prompt: NDArray[np.int32], settings: Calibration, device: str) -> None:
    ids = torch.from_numpy(prompt.astype(np.int64))[None].to(device)
    canvas = model.config.canvas_length
    with torch.no_grad():
        output = model.generate(ids, max_new_tokens=settings.canvases * canvas, max_denoising_steps=settings.steps)
        # The last canvas is never encoded by generate(), and the encoder must see finished text too.
        model.model.encoder(input_ids=output.sequences)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """ModelOpt prints a line per tied tensor, and warns of every deprecation."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield

"""The arithmetic of FP8, NVFP4 and INT4 in torch, exact to the bit: weights as numbers, activations rounded.

FP8 is E4M3 (largest 448). FP4 is E2M1 (0, 0.5, 1, 1.5, 2, 3, 4, 6), rounded to nearest, ties to the even mantissa.
NVFP4 has two levels: a block of 16 numbers shares an E4M3 scale, and all blocks share a float32 one. Sources: OCP 8-bit
floating point and Microscaling specifications; NVIDIA ModelOpt (``NVFP4QTensor``, ``pack_int4_in_uint8``), whose files
these are. Knows nothing of the network.
"""

import numpy as np
import torch

from canvasrt.checkpoint import Checkpoint
from canvasrt.errors import CheckpointError
from canvasrt.formats import E2M1_MAX, E4M3_MAX, NVFP4_BLOCK, Format
from canvasrt.layout import Matrix
from canvasrt.tensorfile import TensorInfo

Tensor = torch.Tensor

_TORCH = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "U8": torch.uint8,
}
_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
_E2M1_CODES = torch.cat([_E2M1, -_E2M1])  # by code: the highest bit is the sign
# Halfway between neighbours; a tie goes to the even code, so bounds are passed at or above in turns.
_E2M1_BOUNDS = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
_LEAST_SCALE = 2.0**-9  # smallest positive E4M3 number


def load(checkpoint: Checkpoint, info: TensorInfo) -> Tensor:
    """One stored tensor as it is, on the CPU. Raises CheckpointError where it holds NaN or infinity."""
    # One copy out of the mapped file: torch has no read-only tensors.
    raw = torch.from_numpy(np.array(checkpoint.array(info.name)))
    tensor = raw.view(_TORCH[info.dtype])
    if info.dtype != "U8":
        finite = torch.isfinite(tensor.float() if info.dtype == "F8_E4M3" else tensor)
        if not finite.all():
            raise CheckpointError(
                f"{info.name} in {info.file} holds {int((~finite).sum())} values that are NaN or infinite: the file is "
                "damaged or training diverged. Download or export the checkpoint again."
            )
    return tensor


def dequantized(checkpoint: Checkpoint, name: str) -> Tensor:
    """A tensor of the model as numbers, in its shape: float32 where it is quantized, else the stored type."""
    stored = checkpoint.stored(name)
    if stored.format.weights == "plain" and len(stored.matrices) == 1:
        return load(checkpoint, stored.matrices[0].weight).view(stored.shape)
    whole = torch.empty(stored.shape)
    rows = whole.view(-1, stored.shape[-1])
    start = 0
    for matrix in stored.matrices:  # one at a time: experts together can be larger than memory leaves room for
        part = _numbers(checkpoint, matrix, stored.format)
        rows[start : start + part.shape[0]] = part
        start += part.shape[0]
    return whole


def input_scale(checkpoint: Checkpoint, name: str) -> Tensor | None:
    """What scales the activations that meet a tensor of the model, float32; None where nothing does.

    (), or (experts,) where experts differ. Gate and up of an expert read the same input: the larger scale of the two
    serves both, as in servers that run them as one product.
    """
    stored = checkpoint.stored(name)
    infos = [matrix.input_scale for matrix in stored.matrices]
    if any(info is None for info in infos):
        return None
    scales = torch.cat([load(checkpoint, info).float().view(1) for info in infos if info is not None])
    if not (scales > 0).all():
        raise CheckpointError(
            f"{checkpoint.folder}: an input_scale of {name} is {float(scales.min()):g}, and must be above 0. The "
            "calibration saw no data there: quantize again with canvasrt quantize."
        )
    if len(scales) > 1:
        scales = scales.view(stored.shape[0], -1).amax(1)
    return scales[0] if bool((scales == scales[0]).all()) else scales


def rounded(x: Tensor, form: Format, scale: Tensor | None) -> Tensor:
    """x (..., in) as it reaches a product with matrices of this format: rounded, then as numbers again, float32.

    ``scale`` is the input_scale, () or (..., 1), for "static" and "block".
    """
    x = x.float()
    if form.activations == "none":
        return x
    if form.activations == "token":
        return _to_e4m3(x, x.abs().amax(-1, keepdim=True) / E4M3_MAX)
    if scale is None:
        raise ValueError(f"{form.activations} activations need an input scale")
    return _to_e4m3(x, scale) if form.activations == "static" else _to_nvfp4(x, scale)


def round_kv(x: Tensor) -> Tensor:
    """K or V as an FP8 cache with scale 1 keeps it (ModelOpt's ``kv_fp8_cast``)."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).to(x.dtype)


def _numbers(checkpoint: Checkpoint, matrix: Matrix, form: Format) -> Tensor:
    weight = load(checkpoint, matrix.weight)
    if matrix.scale is None:
        return weight.float()
    scale = load(checkpoint, matrix.scale).float()
    if form.weights == "fp8":
        return weight.float() * (scale.view(-1, 1) if scale.numel() > 1 else scale.view(()))
    if form.weights == "nvfp4":
        assert matrix.global_scale is not None  # layout.py saw it
        scale = scale * load(checkpoint, matrix.global_scale).view(())
        numbers = _E2M1_CODES[torch.stack([weight & 15, weight >> 4], -1).flatten(-2).int()]
        return _times_blocks(numbers, scale)
    halves = torch.stack([weight & 15, weight >> 4], 1).flatten(0, 1).to(torch.int8)  # low half: the even row
    return _times_blocks(torch.where(halves > 7, halves - 16, halves).float(), scale)


def _times_blocks(numbers: Tensor, scale: Tensor) -> Tensor:
    """numbers (out, in) times scale (out, in / block)."""
    return (numbers.view(*scale.shape, -1) * scale.unsqueeze(-1)).flatten(-2)


def _to_e4m3(x: Tensor, scale: Tensor) -> Tensor:
    """Rounds x / scale to E4M3, saturating; a row of zeros has scale 0 and stays zero."""
    safe = torch.where(scale == 0, 1.0, scale)
    return (x / safe).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float() * safe


def _to_nvfp4(x: Tensor, scale: Tensor) -> Tensor:
    scale = scale.unsqueeze(-1) if scale.dim() else scale
    blocks = x.reshape(*x.shape[:-1], x.shape[-1] // NVFP4_BLOCK, NVFP4_BLOCK)
    # In this order, as ModelOpt has it: another one rounds to another scale once in 2,000 blocks.
    share = blocks.abs().amax(-1, keepdim=True) / (E2M1_MAX * scale)
    of_block = share.clamp(_LEAST_SCALE, E4M3_MAX).to(torch.float8_e4m3fn).float() * scale
    return (_to_e2m1(blocks / of_block) * of_block).flatten(-2)


def _to_e2m1(x: Tensor) -> Tensor:
    size, bounds = x.abs(), _E2M1_BOUNDS.to(x.device)
    code = torch.bucketize(size, bounds)  # bounds below size: a tie stays with the lower code
    odd_tie = torch.isin(size, bounds) & (code % 2 == 1)
    return _E2M1.to(x.device)[code + odd_tie].copysign(x)

"""Random bytes in the formats of a bundle's weights: numbers that a real model could have, and never NaN.

In place of canvasrt.runtime.refit.WeightSource, for bundles that were built from a config.json alone. A step takes as
long with them as with trained ones, but for how evenly the router spreads the tokens. NumPy only.
"""

import time
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from canvasrt.bundle.manifest import WeightEntry
from canvasrt.engine_weights import to_bf16
from canvasrt.network.names import EMBEDDING

Bytes = NDArray[np.uint8]

POOL = (1 << 22) + 15  # numbers that are drawn once and repeated; odd, so that no two rows are equal
_CODES = 256
_SPREAD = 16.0  # of FP8 weights: the largest code is 28 times that
# Of the embedding, against rows of length 1: else every token is about as likely as any other, and the soft embeddings
# of all positions are alike.
PEAKED = 8.0
_ONE = 0x38  # 1.0 in E4M3
# Root of the mean square of what random bytes stand for, by the format of the weights.
_SIZE = {"fp8": _SPREAD, "fp4": 2.93, "int4": 4.64}


class RandomSource:
    """``entries``: all of the bundle, since a scale depends on what it scales. ``seconds``: spent in `made`."""

    def __init__(self, entries: tuple[WeightEntry, ...], seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self._packed = {entry.name: entry for entry in entries if entry.dtype in _SIZE}
        self._bytes = rng.integers(0, _CODES, POOL, np.uint8)
        self._numbers = rng.standard_normal(POOL, np.float32)
        self._e4m3 = normal_codes()[self._bytes]
        self._pools: dict[tuple[str, int, float, float], NDArray[np.generic]] = {}  # few: layers are alike
        self.seconds = 0.0

    def made(self, entry: WeightEntry) -> Bytes:
        """(nbytes,) as the engine wants them."""
        started = time.perf_counter()
        found = np.ascontiguousarray(self._content(entry)).view(np.uint8)
        if found.nbytes != entry.nbytes:
            raise ValueError(f"{entry.name}: {found.nbytes} bytes made, {entry.nbytes} wanted")
        self.seconds += time.perf_counter() - started
        return found

    def _content(self, entry: WeightEntry) -> NDArray[np.generic]:
        count = int(np.prod(entry.shape, dtype=np.int64))
        name = entry.name
        if entry.dtype in ("fp4", "int4"):
            return np.resize(self._bytes, entry.nbytes)
        if entry.dtype == "fp8":
            if name.endswith(".scale"):  # of blocks
                return np.full(count, _ONE, np.uint8)
            return np.resize(self._e4m3, count)
        return np.resize(self._plain(entry, count), count)

    def _plain(self, entry: WeightEntry, count: int) -> NDArray[np.generic]:
        """Numbers, or the bit patterns of BF16, of which the weight is made by repetition."""
        scaled = self._packed.get(entry.name.removesuffix(".multiplier").removesuffix(".scale"))
        if scaled is not None and entry.name != scaled.name:
            middle, spread = _fan_in(scaled) ** -0.5 / _SIZE[scaled.dtype], 0.0
        elif entry.name.rpartition(".")[0].endswith("qk_norm"):  # of all heads, queries and keys
            # Scores have the scale 1: without this every query would see a single key.
            middle, spread = _fan_in(entry) ** -0.25, 0.1 * _fan_in(entry) ** -0.25
        elif len(entry.shape) > 1:
            middle, spread = 0.0, (PEAKED if entry.name == EMBEDDING else 1.0) * _fan_in(entry) ** -0.5
        else:
            middle, spread = 1.0, 0.1
        key = (entry.dtype, min(count, POOL), middle, spread)
        if key not in self._pools:
            numbers = np.float32(middle) + np.float32(spread) * self._numbers[:count]
            self._pools[key] = to_bf16(numbers) if entry.dtype == "bf16" else numbers
        return self._pools[key]


def _fan_in(entry: WeightEntry) -> int:
    """Numbers that a row of a product sums over. Experts side by side count as one: only a few are chosen."""
    return entry.shape[-1] // max(entry.columns, 1)


def normal_codes() -> Bytes:
    """(256,) E4M3 codes of equally likely numbers of a normal distribution."""
    codes = np.arange(_CODES)
    exponent, fraction = (codes >> 3) & 15, codes & 7
    size = np.where(exponent == 0, fraction / 8 * 2.0**-6, (1 + fraction / 8) * 2.0 ** (exponent - 7.0))
    values = np.where(codes > 0x7F, -size, size)
    values[(codes & 0x7F) == 0x7F] = np.inf  # NaN: the nearest to no number
    wanted = _SPREAD * np.array([NormalDist().inv_cdf((code + 0.5) / _CODES) for code in range(_CODES)])
    return np.abs(values[None, :] - wanted[:, None]).argmin(1).astype(np.uint8)

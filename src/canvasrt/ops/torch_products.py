"""Float32 products on a CPU whose rows don't change with what stands beside them.

A matrix product may add up its terms in another order when it has other rows, and then a request's tokens depend on
who else is in the batch. oneDNN adds them one after the other, in blocks of hundreds, for any number of rows from two
on. MKL does with AVX-512 for most shapes; without, it has several ways for the same shape. So oneDNN's result is the
one that counts, and on Intel's processors with AVX-512 MKL computes it where a trial has shown the same bits and less
time.
"""

from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Literal

import torch
from torch.nn import functional

Tensor = torch.Tensor

# Elements up to which a matrix is kept in oneDNN's own layout too, which it else makes anew at every call: 7 us of 28
# for (48, 256) x (256, 128). Larger ones would take twice their memory.
PACKED = 1 << 20
PACKED_IN_ALL = 1 << 24  # elements: no budget counts what is kept twice
PACKED_FOR = 64  # rows that the layout is made for; it is the same for 48 and for 1,024, and another for one
# oneDNN compiles a kernel for every new number of rows, in 0.5 to 2 ms, and keeps 1,024: a call's tokens should be a
# multiple of this.
ROWS = 8
# oneDNN takes 11 to 30 us to start, which matters up to so many multiplications: above them it is always taken. A trial
# takes as long as eight products, so a shape is tried when it has been used so often.
TRIED_UP_TO = 10_000_000
TRIED_FROM = 256  # numbers in a result: of fewer, all may be the same by chance
PROBES = 4  # of a trial; the best time of each counts
ALIGNED = 64  # bytes
TRIED_AT = 32
SHAPES = 4096  # shapes that are counted

# torch offers oneDNN's float32 product under a private name only, the one its compiler uses; functional.linear goes to
# MKL. A test compares the two.
_onednn = torch.ops.mkldnn._linear_pointwise
_pack = torch.ops.mkldnn._reorder_linear_weight

_Multiply = Callable[[Tensor, Tensor], Tensor]
_Kind = Literal["weights", "once", "gated"]
_Shape = tuple[_Kind, int, bool, torch.Size, bool, int]


class Products:
    """Of activations x (..., in) and matrices (out, in), both float32 and on a CPU.

    Weights must not change once they have been used: of small ones a second layout is kept.
    """

    def __init__(self) -> None:
        self._room = PACKED_IN_ALL
        # By the id of a matrix, which stands first in the entry lest another gets its id: as oneDNN takes it, whole or
        # as gate and up halves, and the up half as MKL takes it.
        self._wholes: dict[int, tuple[Tensor, Tensor]] = {}
        self._halves: dict[int, tuple[Tensor, Tensor, Tensor, Tensor]] = {}
        self._tries = may_try_mkl()
        self._shapes: dict[_Shape, int | bool] = {}  # uses so far, then whether MKL is the one to take

    def linear(self, x: Tensor, weights: Tensor) -> Tensor:
        """x times the transposed matrix: (..., out)."""
        if self._takes_mkl("weights", x, weights, functional.linear, self._with_weights):
            return functional.linear(x, weights)
        return self._with_weights(x, weights)

    def once(self, x: Tensor, matrix: Tensor) -> Tensor:
        """As ``linear``, with a matrix that is no weight; contiguous or the transpose of one that is."""
        return (functional.linear if self._takes_mkl("once", x, matrix, functional.linear, product) else product)(
            x, matrix
        )

    def gated(self, x: Tensor, both: Tensor) -> Tensor:
        """GELU of x times the first half of the rows of ``both``, times x times the second half: (..., out / 2)."""
        halves = self._halves.get(id(both))
        if halves is None:
            gate, up = both.chunk(2)
            halves = self._halves[id(both)] = both, self._packed(gate), self._packed(up), up
        if x.numel() == x.shape[-1]:
            return self.gated(_twice(x), both)[:1].view(*x.shape[:-1], -1)
        _, packed_gate, packed_up, up = halves
        # oneDNN applies the GELU and the product while the numbers are in registers: almost free.
        gated = _onednn(x, packed_gate, None, "gelu", [], "tanh")

        def with_mkl(x: Tensor, up: Tensor) -> Tensor:
            return functional.linear(x, up).mul_(gated)

        def with_onednn(x: Tensor, up: Tensor) -> Tensor:
            result: Tensor = _onednn.binary(x, gated, packed_up, None, "mul")
            return result

        return (with_mkl if self._takes_mkl("gated", x, up, with_mkl, with_onednn) else with_onednn)(x, up)

    def _with_weights(self, x: Tensor, weights: Tensor) -> Tensor:
        whole = self._wholes.get(id(weights))
        if whole is None:
            whole = self._wholes[id(weights)] = weights, self._packed(weights)
        return product(x, whole[1])

    def _takes_mkl(self, kind: _Kind, x: Tensor, matrix: Tensor, with_mkl: _Multiply, with_onednn: _Multiply) -> bool:
        """Whether ``with_mkl`` gives the bits of ``with_onednn`` in less time, for x and matrices like these."""
        products = x.numel() * matrix.shape[0]
        if not self._tries or products > TRIED_UP_TO or products < TRIED_FROM * matrix.shape[1]:
            return False
        if (x.data_ptr() | matrix.data_ptr()) % ALIGNED:
            return False  # MKL takes another path than in a trial, whose numbers lie where torch puts them
        # MKL takes another path for other strides and numbers of threads.
        shape = (
            kind,
            x.numel(),
            x.is_contiguous(),
            matrix.shape,
            matrix.is_contiguous(),
            torch.get_num_threads(),
        )
        known = self._shapes.get(shape, 0)
        if known is True or known is False:
            return known
        if known or len(self._shapes) < SHAPES:
            tried = known + 1 >= TRIED_AT
            self._shapes[shape] = _is_better(with_mkl, with_onednn, x, matrix) if tried else known + 1
        return False

    def _packed(self, matrix: Tensor) -> Tensor:
        """A matrix (out, in) as oneDNN takes it best, while there is room for a second layout."""
        if matrix.numel() > min(PACKED, self._room):
            return matrix
        self._room -= matrix.numel()
        result: Tensor = _pack(matrix, PACKED_FOR)
        return result


def _is_better(new: _Multiply, old: _Multiply, x: Tensor, matrix: Tensor) -> bool:
    """Random numbers show another order of the same terms; then the times decide, which change no result."""
    generator = torch.Generator().manual_seed(0)
    times: tuple[list[float], list[float]] = [], []
    for _ in range(PROBES):
        probe = torch.empty_strided(x.shape, x.stride()).uniform_(-1, 1, generator=generator)
        results = []
        for multiply, found in zip((new, old), times, strict=True):
            start = perf_counter()
            results.append(multiply(probe, matrix))
            found.append(perf_counter() - start)
        if not torch.equal(*results):
            return False
    return min(times[0]) < min(times[1])


def may_try_mkl(cpuinfo: str = "/proc/cpuinfo") -> bool:
    """Whether a trial tells what MKL will do: it does where MKL uses AVX-512, so not on other makers' processors."""
    try:
        is_intel = "GenuineIntel" in Path(cpuinfo).read_text()
    except OSError:
        return False
    return is_intel and torch.backends.cpu.get_cpu_capability() == "AVX512"


def product(x: Tensor, matrix: Tensor) -> Tensor:
    """x (..., in) times a transposed matrix (out, in) that is contiguous, or the transpose of one, by oneDNN."""
    if x.numel() == x.shape[-1]:  # one row alone is added up in another order
        return product(_twice(x), matrix)[:1].view(*x.shape[:-1], -1)
    result: Tensor = _onednn(x, matrix, None, "none", [], "")
    return result


def _twice(row: Tensor) -> Tensor:
    return row.view(1, -1).repeat(2, 1)

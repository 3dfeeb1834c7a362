"""Compiled kernels for what the network does between two products, in float32 on a CPU.

A step of a small model is hundreds of calls of 2 to 5 us, most of which take longer to start than to compute. Each
kernel here does in one pass what four to twenty of them do. It computes each row for itself and in one order, so that a
row has the same bits whatever stands beside it.

Kernels take the addresses of C-contiguous float32 arrays, which nothing checks: `canvasrt.ops.torch_fused` is their one
caller. To take a tensor apart would cost as much as a kernel. The shapes are the first lines of each.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
from numba import carray, njit, types
from numba.extending import intrinsic

_Function = TypeVar("_Function", bound=Callable[..., Any])

LEAST = np.float32(-87)  # e^x of less would be no normal number
BELOW_ONE = 1.0 - 2.0**-23  # as in canvasrt.network.sampler

# Sums may run in several lanes. Not "nnan" or "ninf": a NaN has to come through.
_OPTIONS: dict[str, Any] = {"fastmath": {"reassoc", "contract", "nsz"}, "error_model": "numpy"}


def _kernel(function: _Function) -> _Function:
    """Compiles at once, or takes what an earlier process has compiled for this processor."""
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    signature = types.void(*(types.float32 if name == "eps" else types.intp for name in names))
    options = {"nogil": True, **_OPTIONS}
    try:
        return cast(_Function, njit(signature, cache=True, **options)(function))
    except (RuntimeError, OSError):  # nowhere to keep it: neither beside this file nor in the user's cache
        return cast(_Function, njit(signature, **options)(function))


def _pointer_to(element: Any) -> Any:
    def pointer(_context: Any, address: Any) -> Any:
        def generated(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return types.CPointer(element)(types.intp), generated

    return intrinsic(pointer)


def _bits_as_float(_context: Any, bits: Any) -> Any:
    def generated(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(types.float32))

    return types.float32(types.int32), generated


def _float_array(address: int, shape: tuple[int, ...]) -> Any:
    return carray(_float_pointer(address), shape)


def _integer_array(address: int, count: int) -> Any:
    return carray(_integer_pointer(address), (count,))


def _inverse_rms(row: Any, eps: float) -> Any:
    total = np.float32(0)
    for value in row:
        total += value * value
    return np.float32(1) / np.sqrt(total / np.float32(len(row)) + eps)


def _power(x: Any) -> Any:
    """e^x for x <= 0, within 1e-7 of it and 0 below -87. A loop of these is vectorized, which one of np.exp is not.

    Cephes' expf: x = n ln 2 + r, and a polynomial of r.
    """
    n = np.floor(max(x, LEAST) * np.float32(1.4426950408889634) + np.float32(0.5))
    r = max(x, LEAST) - n * np.float32(0.693359375) - n * np.float32(-2.12194440e-4)
    p = np.float32(1.9875691500e-4) * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    scale = _as_float(np.int32((np.int32(n) + np.int32(127)) << np.int32(23)))
    below = np.float32(0) if x <= LEAST else x  # of a NaN, NaN
    return (p * r * r + r + np.float32(1)) * scale if x > LEAST else below


def _least_above(shifted: Any, measure: Any, wanted: Any, halvings: int) -> Any:
    """`_above` of canvasrt.network.sampler for one row."""
    low, high = np.float32(-160), np.float32(0)
    for _ in range(halvings):
        middle = (low + high) * np.float32(0.5)
        kept = np.float32(0)
        for column in range(len(shifted)):
            kept += measure[column] if shifted[column] >= middle else np.float32(0)
        if kept >= wanted:
            low = middle
        else:
            high = middle
    return low


_float_pointer, _integer_pointer = _pointer_to(types.float32), _pointer_to(types.int32)
_as_float = intrinsic(_bits_as_float)
_floats, _integers = njit(inline="always")(_float_array), njit(inline="always")(_integer_array)
# Not inlined by numba, which would give it the options of the kernel: "reassoc" would undo the two steps to r.
_exp = njit(fastmath={"contract"}, error_model="numpy")(_power)
_above = njit(**_OPTIONS)(_least_above)
_scale = njit(inline="always", **_OPTIONS)(_inverse_rms)


@_kernel
def rms(x_at: int, out_at: int, rows: int, size: int, eps: float) -> None:
    x, out = _floats(x_at, (rows, size)), _floats(out_at, (rows, size))
    for row in range(rows):
        factor = _scale(x[row], eps)
        for column in range(size):
            out[row, column] = x[row, column] * factor


@_kernel
def add_normed(
    x_at: int, y_at: int, weights_at: int, out_at: int, normed_at: int, rows: int, size: int, eps: float
) -> None:
    x, y, weights = _floats(x_at, (rows, size)), _floats(y_at, (rows, size)), _floats(weights_at, (size,))
    out, normed = _floats(out_at, (rows, size)), _floats(normed_at, (rows, size))
    for row in range(rows):
        factor = _scale(y[row], eps)
        for column in range(size):
            out[row, column] = x[row, column] + y[row, column] * factor * weights[column]
        factor = _scale(out[row], eps)
        for column in range(size):
            normed[row, column] = out[row, column] * factor


@_kernel
def add_branches(
    x_at: int,
    a_at: int,
    b_at: int,
    a_weights_at: int,
    b_weights_at: int,
    weights_at: int,
    factors_at: int,
    out_at: int,
    normed_at: int,
    rows: int,
    size: int,
    factor_step: int,
    eps: float,
) -> None:
    """``factor_step``: 1 where each row has a factor of its own, 0 where all share one."""
    x, a, b = _floats(x_at, (rows, size)), _floats(a_at, (rows, size)), _floats(b_at, (rows, size))
    a_weights, b_weights = _floats(a_weights_at, (size,)), _floats(b_weights_at, (size,))
    weights, factors = _floats(weights_at, (size,)), _floats(factors_at, (1 + factor_step * (rows - 1),))
    out, normed = _floats(out_at, (rows, size)), _floats(normed_at, (rows, size))
    for row in range(rows):
        of_a, of_b = _scale(a[row], eps), _scale(b[row], eps)
        for column in range(size):
            normed[row, column] = a[row, column] * of_a * a_weights[column] + b[row, column] * of_b * b_weights[column]
        scale, factor = _scale(normed[row], eps), factors[factor_step * row]
        for column in range(size):
            out[row, column] = (x[row, column] + normed[row, column] * scale * weights[column]) * factor
        scale = _scale(out[row], eps)
        for column in range(size):
            normed[row, column] = out[row, column] * scale


@_kernel
def heads(
    x_at: int,
    weights_at: int,
    cos_at: int,
    signed_sin_at: int,
    q_at: int,
    k_at: int,
    v_at: int,
    tokens: int,
    queries: int,
    keys: int,
    dim: int,
    value_is_key: int,
    eps: float,
) -> None:
    weighted = queries + keys
    count = weighted if value_is_key else weighted + keys
    x, weights = _floats(x_at, (tokens, count, dim)), _floats(weights_at, (weighted, dim))
    cos, sin = _floats(cos_at, (tokens, dim)), _floats(signed_sin_at, (tokens, dim))
    q = _floats(q_at, (queries, tokens, dim))
    k, v = _floats(k_at, (tokens, keys, dim)), _floats(v_at, (tokens, keys, dim))
    half = dim // 2
    for token in range(tokens):
        for head in range(count):
            row = x[token, head]
            scale = _scale(row, eps)
            if head < weighted:
                out = q[head, token] if head < queries else k[token, head - queries]
                for i in range(half):
                    first = row[i] * scale * weights[head, i]
                    second = row[half + i] * scale * weights[head, half + i]
                    out[i] = first * cos[token, i] + second * sin[token, i]
                    out[half + i] = second * cos[token, half + i] + first * sin[token, half + i]
            value = head - (queries if value_is_key else weighted)
            if value >= 0:
                for i in range(dim):
                    v[token, value, i] = row[i] * scale


@_kernel
def choose_experts(
    scores_at: int,
    scales_at: int,
    gated_at: int,
    out_at: int,
    rows: int,
    experts: int,
    chosen: int,
    size: int,
    gated_step: int,
) -> None:
    """``gated_step``: numbers from a row of ``gated`` to the next."""
    scores, scales = _floats(scores_at, (rows, experts)), _floats(scales_at, (experts,))
    gated = _floats(gated_at, ((rows - 1) * gated_step + experts * size,))
    out = _floats(out_at, (rows, experts, size))
    weights = np.empty(experts, np.float32)  # -1: not chosen
    for row in range(rows):
        weights[:] = -1
        largest, total = np.float32(0), np.float32(0)
        for rank in range(chosen):
            best = -1
            for expert in range(experts):
                if weights[expert] < 0 and (best < 0 or scores[row, expert] > scores[row, best]):
                    best = expert
            if rank == 0:
                largest = scores[row, best]
            weights[best] = np.exp(scores[row, best] - largest)
            total += weights[best]
        for expert in range(experts):
            if weights[expert] < 0:
                out[row, expert] = 0  # and most of ``gated`` is never read
            else:
                weight = weights[expert] / total * scales[expert]
                first = row * gated_step + expert * size
                for i in range(size):
                    out[row, expert, i] = gated[first + i] * weight


@_kernel
def draw(
    raw_at: int,
    capped_at: int,
    temperature_at: int,
    uniforms_at: int,
    top_k_at: int,
    top_p_at: int,
    argmax_at: int,
    sampled_at: int,
    entropy_at: int,
    shares_at: int,
    rows: int,
    limited: int,
    size: int,
    halvings: int,
) -> None:
    """``limited``: so many of the last rows have limits, one value of top_k and top_p each."""
    raw, capped = _floats(raw_at, (rows, size)), _floats(capped_at, (rows, size))
    temperature, uniforms = _floats(temperature_at, (rows,)), _floats(uniforms_at, (rows,))
    top_k, top_p = _floats(top_k_at, (limited,)), _floats(top_p_at, (limited,))
    argmax, sampled = _integers(argmax_at, rows), _integers(sampled_at, rows)
    entropy, shares = _floats(entropy_at, (rows,)), _floats(shares_at, (rows, size))
    shifted, ones = np.empty(size, np.float32), np.ones(size, np.float32)
    for row in range(rows):
        weights = shares[row]
        best, largest = 0, capped[row, 0]
        for column in range(size):
            if raw[row, column] > raw[row, best]:  # of the raw ones: a softcap makes large ones equal
                best = column
            largest = max(largest, capped[row, column])
        argmax[row] = best
        largest /= temperature[row]
        for column in range(size):
            shifted[column] = capped[row, column] / temperature[row] - largest
        limit = row - (rows - limited)
        least = np.float32(-np.inf)
        if limit >= 0 and top_k[limit] < size:
            least = _above(shifted, ones, top_k[limit], halvings)
        for column in range(size):
            weights[column] = np.float32(0) if shifted[column] < least else _exp(shifted[column])
        if limit >= 0 and top_p[limit] <= 1:
            mass = np.float32(0)
            for column in range(size):
                mass += weights[column]
            least = max(least, _above(shifted, weights, mass * top_p[limit], halvings))
            for column in range(size):
                weights[column] = np.float32(0) if shifted[column] < least else weights[column]
        total, moment = np.float32(0), np.float32(0)
        for column in range(size):
            total += weights[column]
            moment += weights[column] * shifted[column]
        entropy[row] = np.log(total) - moment / total
        # In double precision: over a large vocabulary a sum of one term after the other goes astray.
        whole = 0.0
        for column in range(size):
            whole += weights[column]
        target, reached, token = uniforms[row] * BELOW_ONE * whole, 0.0, 0
        for column in range(size):
            reached += weights[column]
            if reached > target:
                token = column
                break
        sampled[row] = token
        for column in range(size):
            weights[column] /= total

"""Attention of a piece of a context, whose rows don't change with where the context was cut into pieces.

A prompt is cut by chunks, by what a call has room for, and where another request's prefix is taken over. Each query's
sums therefore run over its keys in order, in tiles at fixed positions; keys that others in the piece see and it does
not add exact zeros.
"""

import torch
from torch.nn import functional

from canvasrt.ops.torch_products import ROWS, Products

Tensor = torch.Tensor

TILE = 256  # keys; oneDNN's sums are one chain up to twice as many
# softmax may add so many numbers side by side, and then them; without AVX2 it does. So a key must keep its lane.
LANES = 16
SCORES = 1 << 22  # held at once, 16 MiB
TOGETHER = 2  # K/V heads of one product, of which a query head uses one: a call costs more than what it multiplies


def causal_attention(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, first: int, products: Products) -> Tensor:
    """softmax(q k^T + mask) v, float32 on a CPU: q (1, tokens, heads, dim), keys and values (1, kv_heads, keys, dim),
    mask (1, 1, tokens, keys), and ``first`` the position of the first key. Result (1, tokens, heads * dim).
    """
    _, tokens, heads, _ = q.shape
    _, groups, count, _ = keys.shape
    q, k, v, mask = q[0], keys[0].transpose(0, 1), values[0].transpose(0, 1), mask[0, 0]
    lead = first % LANES
    behind = -(lead + count) % LANES
    if lead or behind:
        mask = functional.pad(mask, (lead, behind), value=-torch.inf)
        k, v = (functional.pad(each, (0, 0, 0, 0, lead, behind)) for each in (k, v))
    if groups <= TOGETHER and tokens * heads * len(k) <= SCORES:
        return _attend(q, k, v, mask, first - lead, products).unsqueeze(0)
    share = heads // groups
    rows = max(1, SCORES // (TOGETHER * share * len(k)))
    bands = []
    for group in range(0, groups, TOGETHER):
        some = q[:, group * share : (group + TOGETHER) * share]
        some_k, some_v = k[:, group : group + TOGETHER], v[:, group : group + TOGETHER]
        pieces = []
        for begin in range(0, tokens, rows):
            few = slice(begin, begin + rows)
            pieces.append(_attend(some[few], some_k, some_v, mask[few], first - lead, products))
        bands.append(torch.cat(pieces))
    return torch.cat(bands, 1).unsqueeze(0)


def _attend(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, first: int, products: Products) -> Tensor:
    """q (tokens, heads, dim), keys and values (keys, kv_heads, dim), mask (tokens, keys): (tokens, heads * dim)."""
    tokens, heads, dim = q.shape
    count, groups, _ = keys.shape
    share = heads // groups
    # Strided matrices would go through oneDNN's reference implementation, a thousand times slower.
    keys, values = (each.reshape(count, groups * dim).contiguous() for each in (keys, values))
    # Each query beside zeros, which the other heads' keys meet.
    apart = q.new_zeros(tokens + -tokens % ROWS, groups, share, groups, dim)
    apart[:tokens].diagonal(dim1=1, dim2=3).copy_(q.view(tokens, groups, share, dim).permute(0, 2, 3, 1))
    scores = products.once(apart.view(-1, groups * dim), keys)
    scores.view(-1, heads, count)[:tokens].add_(mask.unsqueeze(1))
    mixed = _weighted_sum(scores.softmax(-1), values, first, products)
    own = mixed.view(-1, groups, share, groups, dim)[:tokens].diagonal(dim1=1, dim2=3)
    return own.permute(0, 3, 1, 2).reshape(tokens, heads * dim)


def _weighted_sum(weights: Tensor, values: Tensor, first: int, products: Products) -> Tensor:
    """weights (rows, keys) times values (keys, size)."""
    begin, count = 0, len(values)
    total = None
    while begin < count:
        end = min(count, (first + begin) // TILE * TILE + TILE - first)
        part = products.once(weights[:, begin:end], values[begin:end].t())
        total = part if total is None else total.add_(part)
        begin = end
    assert total is not None  # a query sees itself
    return total

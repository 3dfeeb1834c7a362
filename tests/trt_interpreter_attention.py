"""Attention, key/value cache update and rotary embedding."""

import math

import tensorrt_rtx as trt
import torch

from trt_interpreter_values import (
    DT,
    FLOATS,
    INDICES,
    Builder,
    Kernel,
    Value,
    in_float32,
    refusal,
    require,
    require_inputs,
    require_same_type,
)

_PADDED = trt.AttentionIOForm.PADDED_BHND
_CAUSAL = trt.CausalMaskKind
# Inputs of IAttentionInputLayer (NvInfer.h).
_MASK, _QUANTIZE_SCALE, _QUERY_LENGTHS, _KEY_VALUE_LENGTHS = 3, 4, 5, 6


def attention_input(layer: trt.IAttentionInputLayer) -> Kernel:
    """softmax(query @ key^T, masked) @ value: everything happens here, the output layer passes it on.

    query and result [B, Nq, Sq, D]; key and value [B, Nkv, Skv, D], query head n reads head n // (Nq // Nkv); mask
    [B or 1, Nq or 1, Sq, Skv], boolean (True attends) or added to the scores. There is no scale. Scores stay in
    float32 and the result is rounded once. A query that may attend to nothing gives NaN: it is not documented.
    """
    attention = layer.attention
    require(layer, FLOATS, 0, 1, 2)
    require_same_type(layer, 0, 1, 2)
    require_inputs(layer, _KEY_VALUE_LENGTHS + 1)
    if attention.norm_op != trt.AttentionNormalizationOp.SOFTMAX:
        raise refusal(layer, f"normalization {attention.norm_op}")
    if attention.query_form != _PADDED or attention.key_value_form != _PADDED:
        raise refusal(layer, f"forms {attention.query_form} and {attention.key_value_form}")
    if attention.num_ranks != 1:
        raise refusal(layer, f"num_ranks {attention.num_ranks}")
    given = [index < layer.num_inputs and layer.get_input(index) is not None for index in range(7)]
    if given[_QUANTIZE_SCALE] or given[_QUERY_LENGTHS]:
        raise refusal(layer, "a quantized normalization or query lengths")
    kind = attention.causal_kind
    if kind not in (_CAUSAL.NONE, _CAUSAL.UPPER_LEFT, _CAUSAL.LOWER_RIGHT):
        raise refusal(layer, f"causal kind {kind}")
    if given[_MASK]:
        require(layer, frozenset({DT.BOOL, layer.get_input(0).dtype}), _MASK)
        if kind != _CAUSAL.NONE:
            raise refusal(layer, f"causal kind {kind.name} with a mask")
    if given[_KEY_VALUE_LENGTHS]:
        require(layer, frozenset({DT.INT32}), _KEY_VALUE_LENGTHS)
        # Whether the lower right corner is that of the padded or of the filled keys is not documented.
        if kind == _CAUSAL.LOWER_RIGHT:
            raise refusal(layer, "causal kind LOWER_RIGHT with key-value lengths")

    def kernel(inputs: list[Value | None]) -> list[Value]:
        padded = inputs + [None] * (7 - len(inputs))
        return [_attend(*padded[:3], padded[_MASK], padded[_KEY_VALUE_LENGTHS], kind)]

    return kernel


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    lengths: torch.Tensor | None,
    kind: trt.CausalMaskKind,
) -> torch.Tensor:
    (batch, heads, rows, width), (kv_heads, columns) = query.shape, key.shape[1:3]
    if key.shape != (batch, kv_heads, columns, width) or value.shape != key.shape or heads % kv_heads:
        raise ValueError(f"attention of query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}")
    if mask is not None and (
        mask.shape[2:] != (rows, columns) or mask.shape[0] not in (1, batch) or mask.shape[1] not in (1, heads)
    ):
        raise ValueError(f"attention mask {tuple(mask.shape)} of query {tuple(query.shape)}, key {tuple(key.shape)}")
    if columns == 0:
        return torch.full_like(query, math.nan)
    grouped = query.float().unflatten(1, (kv_heads, heads // kv_heads))
    scores = torch.matmul(grouped, key.float().unsqueeze(2).mT).flatten(1, 2)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.float()
    if kind != _CAUSAL.NONE:
        offset = columns - rows if kind == _CAUSAL.LOWER_RIGHT else 0
        visible = torch.arange(columns) <= torch.arange(rows).unsqueeze(-1) + offset
        scores = scores.masked_fill(~visible, -math.inf)
    if lengths is not None:
        if lengths.shape != (batch,) or ((lengths < 0) | (lengths > columns)).any():
            raise ValueError(f"key-value lengths {lengths.tolist()} of {batch} sequences of {columns}")
        scores = scores.masked_fill(torch.arange(columns) >= lengths.reshape(-1, 1, 1, 1), -math.inf)
    weights = torch.softmax(scores, dim=-1).unflatten(1, (kv_heads, heads // kv_heads))
    return torch.matmul(weights, value.float().unsqueeze(2)).flatten(1, 2).to(query.dtype)


def attention_output(layer: trt.IAttentionOutputLayer) -> Kernel:
    require_inputs(layer, 1)
    return lambda inputs: [inputs[0]]


def kv_cache_update(layer: trt.IKVCacheUpdateLayer) -> Kernel:
    """cache [B, N, L, D] with update [B, N, S, D] at write_indices [B]: a copy, while an engine writes in place."""
    require(layer, FLOATS, 0, 1)
    require(layer, INDICES, 2)
    require_same_type(layer, 0, 1)
    require_inputs(layer, 3)
    if layer.cache_mode != trt.KVCacheMode.LINEAR or layer.update_form != _PADDED:
        raise refusal(layer, f"mode {layer.cache_mode} and form {layer.update_form}")
    if not layer.get_input(0).is_network_input or not layer.get_output(0).is_network_output:
        raise refusal(layer, "a cache that is not a network input, or an updated cache that is not a network output")

    def kernel(inputs: list[Value | None]) -> list[Value]:
        cache, update, indices = inputs
        (batch, heads, length, width), new = cache.shape, update.shape[2]
        if update.shape != (batch, heads, new, width) or indices.shape != (batch,):
            raise ValueError(
                f"cache {tuple(cache.shape)}, update {tuple(update.shape)}, {tuple(indices.shape)} indices"
            )
        if ((indices < 0) | (indices + new > length)).any():
            raise ValueError(f"{new} new rows at {indices.tolist()} of a cache of length {length}")
        result = cache.clone()
        for row, start in enumerate(indices.tolist()):
            result[row, :, start : start + new] = update[row]
        return [result]

    return kernel


def rotary_embedding(layer: trt.IRotaryEmbeddingLayer) -> Kernel:
    """x [B, N, S, D]; cosines and sines [B, S, R/2], or [positions, R/2] with position ids [B, S] as input 3.

    The first R elements of D (all if rotary_embedding_dim is 0) rotate: in pairs (i, i + R/2), or (2i, 2i + 1) if
    interleaved.
    """
    require(layer, FLOATS, 0, 1, 2)
    require_same_type(layer, 0, 1, 2)
    require_inputs(layer, 4)
    interleaved, rotary = layer.interleaved, layer.rotary_embedding_dim
    given = layer.num_inputs > 3 and layer.get_input(3) is not None
    if given:
        require(layer, frozenset({DT.INT64}), 3)

    def compute(x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
        width = rotary or x.shape[-1]
        turning, rest = x[..., :width], x[..., width:]
        pairs = turning.unflatten(-1, (width // 2, 2)) if interleaved else turning.unflatten(-1, (2, width // 2)).mT
        first, second = pairs.unbind(-1)
        cosines, sines = cosines.unsqueeze(1), sines.unsqueeze(1)
        turned = torch.stack((first * cosines - second * sines, first * sines + second * cosines), dim=-1)
        return torch.cat(((turned if interleaved else turned.mT).flatten(-2), rest), dim=-1)

    def kernel(inputs: list[Value | None]) -> list[Value]:
        x, cosines, sines = inputs[:3]
        width = rotary or x.shape[-1]
        if given:
            positions = inputs[3]
            if positions.shape != (x.shape[0], x.shape[2]) or ((positions < 0) | (positions >= len(cosines))).any():
                raise ValueError(f"rotary embedding: positions {positions.tolist()} of {len(cosines)}")
            cosines, sines = cosines[positions], sines[positions]
        if width % 2 or width > x.shape[-1] or not cosines.shape == sines.shape == (
            x.shape[0], x.shape[2], width // 2
        ):  # fmt: skip
            raise ValueError(f"rotary embedding of {tuple(x.shape)}, width {width}, by {tuple(cosines.shape)}")
        return [in_float32(compute, x, cosines, sines)]

    return kernel


_TYPES = trt.LayerType
BUILDERS: dict[trt.LayerType, tuple[type, Builder]] = {
    _TYPES.ATTENTION_INPUT: (trt.IAttentionInputLayer, attention_input),
    _TYPES.ATTENTION_OUTPUT: (trt.IAttentionOutputLayer, attention_output),
    _TYPES.KV_CACHE_UPDATE: (trt.IKVCacheUpdateLayer, kv_cache_update),
    _TYPES.ROTARY_EMBEDDING: (trt.IRotaryEmbeddingLayer, rotary_embedding),
}

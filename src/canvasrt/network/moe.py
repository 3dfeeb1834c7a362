"""Router and the formulations of the expert layer: ``dense``, ``capacity`` and ``sparse`` give the same result.

Reference: transformers ``DiffusionGemmaTextRouter`` and ``DiffusionGemmaTextExperts``.

``dense``     every expert on every token as two large products, unselected experts multiplied by 0: weights are read
once.
``capacity``  tokens gathered into (experts, C) seats: C / tokens of dense's work. Exact unless an expert gets more
              than C tokens; the second result tells how many the busiest got, and the caller repeats the call with
              more seats where they did not suffice.
``sparse``    only the chosen experts, grouped by the lowering at run time.
"""

from dataclasses import dataclass
from typing import Generic, Literal

from canvasrt.network.names import decoder_layer
from canvasrt.ops.protocol import Ops, T
from canvasrt.spec import ModelSpec

Formulation = Literal["dense", "capacity", "sparse"]


@dataclass(frozen=True, slots=True)
class MoeChoice:
    """How a runner computes the expert layer. ``capacity`` is in tokens per expert, for "capacity" only."""

    formulation: Formulation
    capacity: int = 0


@dataclass(frozen=True, slots=True)
class Moe(Generic[T]):
    """How one call computes it."""

    formulation: Formulation
    seats: T | None = None  # (C,) float32: 0, 1, 2, ...; for "capacity", whose C may differ from call to call


@dataclass(frozen=True, slots=True)
class Routing(Generic[T]):
    experts: T  # (tokens, k) integer
    weights: T  # (tokens, k) float32, renormalised over the k and times per_expert_scale


def router_scores(ops: Ops[T], spec: ModelSpec, layer: int, normed: T) -> T:
    """(tokens, experts). ``normed`` (tokens, hidden) is the raw residual after a norm without weight, in float32."""
    prefix = decoder_layer(layer) + "router."
    return ops.linear_scaled(normed, prefix + "scale", prefix + "proj.weight", factor=spec.hidden_size**-0.5)


def gates(ops: Ops[T], layer: int, normed: T, mlp: tuple[str, str, str], moe: Moe[T]) -> tuple[T, T | None]:
    """Gate and up of the dense MLP, (tokens, size), and where every expert sees every token, of the experts too."""
    if moe.formulation != "dense":
        return ops.gated_linear(normed, *mlp), None
    return ops.gated_both(normed, mlp, _gate_names(layer))


def _gate_names(layer: int) -> tuple[str, str]:
    prefix = decoder_layer(layer)
    return prefix + "pre_feedforward_layernorm_2.weight", prefix + "experts.gate_up_proj"


def expert_layer(
    ops: Ops[T], spec: ModelSpec, layer: int, normed: T, gated: T | None, scores: T, moe: Moe[T]
) -> tuple[T, T | None]:
    """The residual ``normed`` (tokens, hidden), as for `router_scores`, through its norm weight and the chosen experts.

    ``gated`` is what `gates` gave. Returns the result (tokens, hidden), and with "capacity" the tokens of the busiest
    expert, (1, 1) float32.
    """
    scale, gate_up = _gate_names(layer)
    prefix = decoder_layer(layer)
    down, of_experts = prefix + "experts.down_proj", prefix + "router.per_expert_scale"
    if gated is not None:
        chosen = ops.choose_experts(gated, scores, of_experts, spec.experts, spec.experts_per_token)
        return ops.experts_summed(chosen, down), None
    routing = Routing(*ops.route(scores, of_experts, spec.experts_per_token))
    x = ops.scaled(normed, scale)
    if moe.formulation == "sparse":
        return ops.experts_routed(x, routing.experts, ops.cast(routing.weights, "model"), gate_up, down), None
    if moe.seats is None:
        raise ValueError("the capacity formulation needs seats")
    return _capacity(ops, spec, x, routing, gate_up, down, moe.seats)


def _capacity(
    ops: Ops[T], spec: ModelSpec, x: T, routing: Routing[T], gate_up: str, down: str, seats: T
) -> tuple[T, T]:
    capacity = ops.add(ops.max(seats, axis=0), 1.0)  # (1,)
    zeros = ops.multiply(routing.weights, 0.0)  # (tokens, k)
    selected = ops.spread(ops.add(zeros, 1.0), routing.experts, spec.experts)
    # The token's place in each expert's queue, in token order; -1 where the expert was not chosen.
    place = ops.subtract(ops.multiply(ops.cumulative_sum(selected, axis=0), selected), 1.0)  # (tokens, experts)
    busiest = ops.add(ops.max(ops.max(place, axis=0), axis=1), 1.0)
    last = ops.subtract(capacity, 1.0)
    seat = ops.minimum(ops.take_along_last(place, routing.experts), last)  # who has none shares the last one: see above
    flat = ops.add(ops.multiply(ops.to_float(routing.experts), capacity), seat)
    flat = ops.to_int(ops.reshape(flat, (-1,)))
    numbers = ops.add(ops.reshape(ops.row_numbers(selected), (-1, 1)), zeros)
    every_seat = ops.add(ops.reshape(ops.zeros(spec.experts), (-1, 1)), ops.multiply(seats, 0.0))  # (experts, C)
    # An empty seat computes token 0, which nobody reads.
    token_of_seat = ops.scatter(ops.reshape(every_seat, (-1,)), flat, ops.reshape(numbers, (-1,)))
    gathered = ops.take_rows(x, ops.to_int(token_of_seat))
    gathered = ops.reshape(gathered, (spec.experts, -1, spec.hidden_size))
    out = ops.experts_batched(ops.gated_gelu(ops.experts_batched(gathered, gate_up)), down)
    rows = ops.take_rows(ops.reshape(out, (-1, spec.hidden_size)), flat)
    rows = ops.reshape(rows, (-1, spec.experts_per_token, spec.hidden_size))
    weights = ops.reshape(ops.cast(routing.weights, "model"), (0, spec.experts_per_token, 1))
    return ops.reshape(ops.sum(ops.multiply(rows, weights), axis=1), (-1, spec.hidden_size)), busiest

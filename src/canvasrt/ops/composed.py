"""Primitives that a lowering need not have in one piece: they are made of the smaller ones."""

from typing import Generic

from canvasrt.ops.protocol import Ops, T


class Composed(Generic[T]):
    """For lowerings to inherit; shapes and meaning are documented in canvasrt.ops.protocol.Ops."""

    def scaled(self: Ops[T], normed: T, scale: str, factor: float = 1.0) -> T:
        scaled = self.multiply(normed, self.weight(scale, "float32"))
        return self.cast(scaled if factor == 1.0 else self.multiply(scaled, factor), "model")

    def heads(
        self: Ops[T],
        projected: T,
        dim: int,
        queries: tuple[str, int],
        keys: tuple[str, int],
        value_is_key: bool,
        eps: float,
        cos: T,
        signed_sin: T,
    ) -> tuple[T, T, T]:
        normed = self.rms(self.reshape(projected, (0, 0, -1, dim)), eps)
        both = queries[1] + keys[1]
        queries_and_keys, v = (
            (normed, self.split(normed, [queries[1], keys[1]], axis=2)[1])
            if value_is_key
            else self.split(normed, [both, keys[1]], axis=2)
        )
        rotated = self.rotate(queries_and_keys, cos, signed_sin, queries, keys)
        q, k = self.split(self.cast(rotated, "model"), [queries[1], keys[1]], axis=2)
        return q, k, self.cast(v, "model")

    def add_normed(self: Ops[T], x: T, y: T, scale: str, eps: float) -> tuple[T, T]:
        x = self.add_scaled(x, self.rms(y, eps), scale)
        return x, self.rms(x, eps)

    def add_branches(
        self: Ops[T], x: T, branches: tuple[T, T], scales: tuple[str, str, str], factor: T, eps: float
    ) -> tuple[T, T]:
        first, second = (self.rms(branch, eps) for branch in branches)
        both = self.add_scaled(self.scaled(first, scales[0]), second, scales[1])
        x = self.add_scaled(x, self.reshape_like(self.rms(both, eps), x), scales[2])
        x = self.multiply(x, factor)
        return x, self.rms(x, eps)

    def route(self: Ops[T], scores: T, scale: str, k: int) -> tuple[T, T]:
        chosen, experts = self.top_k(self.cast(scores, "float32"), k)
        # The softmax over the chosen ones is the softmax over all, renormalised: the rest of the sum cancels.
        of_expert = self.take_rows(self.weight(scale, "float32"), experts)
        return experts, self.multiply(self.softmax(chosen), of_expert)

    def draw(
        self: Ops[T], raw: T, softcap: float, temperature: T, uniforms: T, limits: tuple[T, T] | None, halvings: int
    ) -> tuple[T, T, T, T] | None:
        return None

    def choose_experts(self: Ops[T], gated: T, scores: T, scale: str, experts: int, k: int) -> T:
        chosen, weights = self.route(scores, scale, k)
        of_expert = self.cast(self.spread(weights, chosen, experts), "model")
        hidden = self.reshape(gated, (0, experts, -1))
        return self.reshape(self.multiply(hidden, self.reshape(of_expert, (0, experts, 1))), (0, -1))

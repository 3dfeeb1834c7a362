"""The primitives that the network is written in; every lowering implements the same ones.

A lowering is an object over some tensor type ``T``: torch tensors computed at once, or handles of a graph that a
compiler will see. Two rules keep a network lowerable to both: no Python control flow on tensor values, and no Python
integer read from a dimension that varies between calls (reshape passes such a dimension on with 0).

Knows nothing of the model's structure, of devices or of where weights come from.
"""

from collections.abc import Sequence
from typing import Literal, Protocol, TypeVar

T = TypeVar("T")

Number = float | int
Precision = Literal["float32", "model"]  # "model" is the dtype that the lowering computes the network in


class Ops(Protocol[T]):
    """Primitives over tensors of type ``T``.

    Shapes are given in each docstring; ``...`` is any number of leading axes.
    """

    # Weights, by checkpoint name. The lowering owns their format: a quantized matrix is the lowering's affair.

    def weight(self, name: str, precision: Precision = "model") -> T:
        """A small tensor (norm weight, scale, layer scalar) as it is stored."""
        ...

    def linear(self, x: T, *names: str) -> T:
        """x (..., in) times the transposed matrices (out_i, in), side by side: (..., sum of out_i)."""
        ...

    def linear_scaled(self, normed: T, scale: str, *names: str, factor: float = 1.0) -> T:
        """``linear`` of normed (..., in) float32 times the vector ``scale`` and ``factor``: a norm and what follows.

        A lowering may fold the vector into the matrices where that rounds no worse.
        """
        ...

    def gated_linear(self, normed: T, scale: str, gate: str, up: str) -> T:
        """Both halves of a gated MLP, ``linear_scaled`` each: gelu_tanh(gate) * up, (..., out)."""
        ...

    def linear_transposed(self, x: T, name: str) -> T:
        """x (..., out) times one matrix (out, in): (..., in). The way back through a tied embedding."""
        ...

    def embedding(self, tokens: T, name: str) -> T:
        """Rows of the matrix (vocabulary, hidden) for integer tokens (...): (..., hidden)."""
        ...

    def gated_both(self, normed: T, mlp: tuple[str, str, str], experts: tuple[str, str]) -> tuple[T, T]:
        """``gated_linear`` of a dense MLP and of every expert of the same normed (rows, in): a lowering may make one
        product of the two.

        ``mlp`` is (scale, gate, up) and gives (rows, out); ``experts`` is (scale, matrices (experts, 2 out, in)) and
        gives (rows, experts * out).
        """
        ...

    def experts_summed(self, x: T, name: str) -> T:
        """x (rows, experts * in) through the matrices (experts, out, in), summed over experts: (rows, out)."""
        ...

    def experts_batched(self, x: T, name: str) -> T:
        """x (experts, capacity, in), each expert its own matrix (experts, out, in): (experts, capacity, out)."""
        ...

    def experts_routed(self, x: T, experts: T, route: T, gate_up: str, down: str) -> T:
        """The whole gated expert layer, only for the chosen experts: x (rows, in), experts and route (rows, k).

        Lowerings without dynamic grouping refuse it (InputError); their profiles name another formulation.
        """
        ...

    # Arithmetic, broadcasting like NumPy.

    def rounded(self, value: float) -> float:
        """``value`` as the model's precision stores it: the reference keeps some constants in the weights' dtype."""
        ...

    def add(self, a: T, b: T | Number) -> T: ...
    def subtract(self, a: T, b: T | Number) -> T: ...
    def multiply(self, a: T, b: T | Number) -> T: ...
    def divide(self, a: T, b: T | Number) -> T: ...
    def maximum(self, a: T, b: T | Number) -> T: ...
    def minimum(self, a: T, b: T | Number) -> T: ...
    def less_equal(self, a: T, b: T | Number) -> T:
        """Boolean tensor."""
        ...

    def where(self, condition: T, a: T, b: T | Number) -> T: ...
    def exp(self, x: T) -> T: ...
    def log(self, x: T) -> T: ...
    def tanh(self, x: T) -> T: ...
    def gated_gelu(self, x: T) -> T:
        """x (..., 2n) as gate and up halves: gelu_tanh(gate) * up, (..., n)."""
        ...

    def scaled(self, normed: T, scale: str, factor: float = 1.0) -> T:
        """normed (..., n) float32 times the vector ``scale`` (n,) and ``factor``, in the model's precision."""
        ...

    def add_scaled(self, x: T, normed: T, scale: str) -> T:
        """x plus normed (float32, same shape) times the vector ``scale``, in the model's precision."""
        ...

    def rms(self, x: T, eps: float) -> T:
        """x / sqrt(mean(x^2) + eps) over the last axis, computed and returned in float32."""
        ...

    def add_normed(self, x: T, y: T, scale: str, eps: float) -> tuple[T, T]:
        """``add_scaled`` of x and ``rms`` of y (both (..., n)), and ``rms`` of the sum."""
        ...

    def add_branches(
        self, x: T, branches: tuple[T, T], scales: tuple[str, str, str], factor: T, eps: float
    ) -> tuple[T, T]:
        """Two branches, each through a norm with weight, summed, through a third norm and added to x, times ``factor``.

        x (..., n); branches (rows, n) with as many rows as x has; ``scales`` the norms' vectors (n,) in that order;
        ``factor`` (1,) or (..., 1). The second result is ``rms`` of the first.
        """
        ...

    def cast(self, x: T, precision: Precision) -> T: ...
    def to_float(self, x: T) -> T:
        """Booleans or integers as float32."""
        ...

    def to_int(self, x: T) -> T:
        """Whole float32 numbers as the lowering's index type."""
        ...

    # Reductions and selection.

    def sum(self, x: T, axis: int) -> T:
        """Keeps the axis with length 1."""
        ...

    def max(self, x: T, axis: int) -> T:
        """Keeps the axis with length 1."""
        ...

    def softmax(self, x: T) -> T:
        """Over the last axis."""
        ...

    def argmax(self, x: T) -> T:
        """Index of the first largest value of the last axis, that axis removed."""
        ...

    def top_k(self, x: T, k: int) -> tuple[T, T]:
        """(values, indices) of the k largest of the last axis, largest first."""
        ...

    def cumulative_sum(self, x: T, axis: int) -> T: ...
    def one_hot(self, indices: T, depth: int) -> T:
        """(...) to (..., depth) in float32; an index outside 0..depth-1 gives zeros."""
        ...

    def spread(self, values: T, indices: T, depth: int) -> T:
        """values (rows, k) put at indices (rows, k) of zeros (rows, depth); the indices of a row differ."""
        ...

    def row_numbers(self, x: T) -> T:
        """0, 1, 2, ... for the rows of x (rows, ...): (rows,) in float32."""
        ...

    def zeros(self, count: int) -> T:
        """(count,) in float32."""
        ...

    def scatter(self, base: T, indices: T, values: T) -> T:
        """base (n,) with values (m,) at the integer indices (m,); any one of several values for the same index."""
        ...

    def take_rows(self, x: T, indices: T) -> T:
        """x (rows, ...) at integer indices (n,): (n, ...); x (rows,) takes indices of any shape and gives that one."""
        ...

    def take_along_last(self, x: T, indices: T) -> T:
        """x (..., n) at indices (..., m): (..., m)."""
        ...

    def draw(
        self, raw: T, softcap: float, temperature: T, uniforms: T, limits: tuple[T, T] | None, halvings: int
    ) -> tuple[T, T, T, T] | None:
        """The sampler of canvasrt.network.sampler in one piece, for a lowering that has it; None: it is to be composed.

        raw (rows, vocabulary), temperature and uniforms (rows, 1); ``limits`` are top_k and top_p of the last rows,
        (limited rows, 1), as in ``Filters``, whose thresholds are found in so many ``halvings``. Gives argmax, sampled,
        entropy, (rows,) each, and the probabilities (rows, vocabulary).
        """
        ...

    # Experts.

    def route(self, scores: T, scale: str, k: int) -> tuple[T, T]:
        """The k experts of each row with the highest scores (rows, experts), and their weights: (rows, k) both.

        Weights are float32: a softmax over the k scores, times the vector ``scale`` (experts,).
        """
        ...

    def choose_experts(self, gated: T, scores: T, scale: str, experts: int, k: int) -> T:
        """gated (rows, experts * n) with each expert's part times its weight as ``route`` gives it, or 0."""
        ...

    # Layout.

    def reshape(self, x: T, shape: Sequence[int]) -> T:
        """-1 is inferred, 0 keeps the input's length of that axis."""
        ...

    def reshape_like(self, x: T, like: T) -> T:
        """The same elements in the shape of ``like``."""
        ...

    def split(self, x: T, sizes: Sequence[int], axis: int) -> tuple[T, ...]: ...
    def concat(self, parts: Sequence[T], axis: int) -> T: ...
    def split_rows(self, x: T, last: T) -> tuple[T, T]:
        """The first rows of x (rows, ...) and its last ones, as many as ``last`` (n, ...) has."""
        ...

    # Attention.

    def heads(
        self,
        projected: T,
        dim: int,
        queries: tuple[str, int],
        keys: tuple[str, int],
        value_is_key: bool,
        eps: float,
        cos: T,
        signed_sin: T,
    ) -> tuple[T, T, T]:
        """Queries, keys and values (rows, tokens, heads, dim) out of a fused projection, in the model's precision.

        ``projected`` (rows, tokens, heads * dim) has the query heads, then the key heads, then, unless
        ``value_is_key``, as many value heads. Every head goes through ``rms``; queries and keys, each given as the
        norm's vector (dim,) and the number of heads, are then rotated as in ``rotate``. Values are not.
        """
        ...

    def rotate(self, x: T, cos: T, signed_sin: T, *norms: tuple[str, int]) -> T:
        """Per-head norm weights, then rotary embedding, of x (..., heads, dim) in float32.

        Each (name, heads) in ``norms`` gives that many heads the vector (dim,). With x so weighted, the result is
        x * cos + roll(x, dim / 2) * signed_sin, both factors (..., 1, dim).
        """
        ...

    def attention(self, q: T, keys: T, values: T, mask: T | None, first: int = 0) -> T:
        """softmax(q k^T + mask) v with scale 1 and grouped query heads.

        q (rows, tokens, heads, dim); keys and values as the cache returned them; mask (rows, 1, tokens or 1, keys),
        added; None when every key is visible. ``first`` is the position of the first key, for a lowering whose results
        are not to change with where a context was cut. Result (rows, tokens, heads * dim).
        """
        ...


class Cache(Protocol[T]):
    """The K and V memory of one call: which rows, written where, and what each token sees."""

    def append(self, layer: int, k: T, v: T) -> None:
        """Writes k, v (rows, tokens, kv_heads, dim) behind each row's context."""
        ...

    def attend(self, ops: Ops[T], layer: int, q: T, k: T, v: T) -> T:
        """Writes k and v, then lets q (rows, tokens, heads, dim) attend: (rows, tokens, heads * dim)."""
        ...

"""What a text engine's tensors and shape ranges must be, from a config.json and a few numbers.

Written from docs/engine.md, with nothing of the code that makes the engine.
"""

from dataclasses import dataclass
from typing import Any

EMBEDDING = "model.decoder.embed_tokens.weight"
ROWS = EMBEDDING + ".rows"
TYPICAL_KEYS = 4096

Tensor = tuple[str, str, tuple[int, ...], str | None]  # mode, dtype, shape, the input whose memory it is
Range = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Numbers:
    """What a build was asked for. ``capacity``: of encoder and decoder, None with dense experts."""

    slots: int
    context: int
    chunk: int
    canvases: int
    capacity: tuple[int, int] | None


@dataclass(frozen=True)
class LayerShape:
    kind: str
    kv_heads: int
    head_dim: int


def layers_of(config: dict[str, Any]) -> list[LayerShape]:
    """Both forms of the config: as published, and as transformers writes it."""
    text = config["text_config"]
    kinds = [kind.removesuffix("_attention") for kind in text["layer_types"]]
    kinds[-1] = "full"
    own = {int(key): value for key, value in (text.get("per_layer_config") or {}).items()}
    found = []
    for index, kind in enumerate(kinds):
        heads, width = text["num_key_value_heads"], text["head_dim"]
        if "per_layer_config" in text:
            width = own.get(index, {}).get("head_dim") or width
            heads = own.get(index, {}).get("num_key_value_heads") or heads
        elif kind == "full":
            width = text.get("global_head_dim", 512)
            heads = text.get("num_global_key_value_heads") or heads
        found.append(LayerShape(kind, heads, width))
    return found


def sliding_rows(config: dict[str, Any], numbers: Numbers) -> int:
    window, canvas = config["text_config"]["sliding_window"] - 1, config["canvas_length"]
    return int(window + max(numbers.chunk, canvas) + canvas)


def expected_tensors(config: dict[str, Any], numbers: Numbers) -> dict[str, Tensor]:
    text, layers = config["text_config"], layers_of(config)
    hidden, vocabulary = text["hidden_size"], text["vocab_size"]
    inputs: dict[str, tuple[str, tuple[int, ...]]] = {
        "tokens": ("int32", (-1, -1)),
        "is_canvas": ("bool", (-1, -1, 1)),
        "soft": ("bf16", (-1, -1, hidden)),
        "keys": ("int32", (-1,)),
        "head_rows": ("int32", (-1,)),
        "temperature": ("float", (-1, 1)),
        "uniforms": ("float", (-1, 1)),
        "top_k": ("float", (-1, 1)),
        "top_p": ("float", (-1, 1)),
        "logit_rows": ("int32", (-1,)),
        EMBEDDING: ("bf16", (vocabulary, hidden)),
        ROWS: ("bf16", (vocabulary, hidden)),
    }
    if numbers.capacity is not None:
        inputs["seats"] = ("float", (-1,))
    for layer in layers:
        inputs |= {f"{name}.{layer.kind}": ("float", (-1, -1, layer.head_dim // 2)) for name in ("cos", "sin")}
        inputs |= {f"{name}.{layer.kind}": ("int32", (-1, -1)) for name in ("first", "end")}
        inputs[f"write.{layer.kind}"] = ("int32", (-1,))
    found: dict[str, Tensor] = {
        name: ("input", *each, EMBEDDING if name == ROWS else None) for name, each in inputs.items()
    }
    for index, layer in enumerate(layers):
        rows = numbers.context if layer.kind == "full" else sliding_rows(config, numbers)
        shape = (-1, layer.kv_heads, rows, layer.head_dim)
        for name in (f"k.{index}", f"v.{index}"):
            found[name] = ("input", "bf16", shape, None)
            found[f"{name}.next"] = ("output", "bf16", shape, name)
    found |= {
        "argmax": ("output", "int32", (-1,), None),
        "sampled": ("output", "int32", (-1,), None),
        "entropy": ("output", "float", (-1,), None),
        "soft.next": ("output", "bf16", (-1, hidden), None),
        "logits": ("output", "float", (-1, vocabulary), None),
    }
    if numbers.capacity is not None:
        found["busiest"] = ("output", "float", (1, 1), None)
    return found


def expected_ranges(config: dict[str, Any], numbers: Numbers) -> dict[str, dict[str, Range]]:
    canvas, most = config["canvas_length"], numbers.canvases
    encoder = _range(config, numbers, 0, ((1, 1), (1, numbers.chunk), (1, numbers.chunk)), (0, 0, 0))
    decoder = _range(config, numbers, 1, ((1, canvas), (1, canvas), (most, canvas)), (0, canvas, most * canvas))
    return {"encoder": encoder, "decoder": decoder}


def _range(
    config: dict[str, Any],
    numbers: Numbers,
    index: int,
    calls: tuple[tuple[int, int], ...],
    head: tuple[int, int, int],
) -> dict[str, Range]:
    """``calls``: rows and tokens of the smallest, the typical and the largest."""
    found: dict[str, list[tuple[int, ...]]] = {}
    hidden, canvas = config["text_config"]["hidden_size"], config["canvas_length"]
    most = calls[2][0] * calls[2][1]
    for place, (rows, tokens) in enumerate(calls):
        keys = (tokens, max(tokens, min(TYPICAL_KEYS, numbers.context)), numbers.context)[place]
        limited = (0, 0, head[2])[place]
        sizes: dict[str, tuple[int, ...]] = {
            "tokens": (rows, tokens),
            "is_canvas": (rows, tokens, 1),
            "soft": (rows, tokens, hidden),
            "keys": (keys,),
            "head_rows": (head[place],),
            "temperature": (head[place], 1),
            "uniforms": (head[place], 1),
            "top_k": (limited, 1),
            "top_p": (limited, 1),
            "logit_rows": (min(limited, canvas),),
            EMBEDDING: (config["text_config"]["vocab_size"], hidden),
            ROWS: (config["text_config"]["vocab_size"], hidden),
        }
        if numbers.capacity is not None:
            sizes["seats"] = ((1, min(numbers.capacity[index], most), most)[place],)
        for number, layer in enumerate(layers_of(config)):
            length = numbers.context if layer.kind == "full" else sliding_rows(config, numbers)
            sizes |= {f"{name}.{layer.kind}": (rows, tokens, layer.head_dim // 2) for name in ("cos", "sin")}
            sizes |= {f"{name}.{layer.kind}": (rows, tokens) for name in ("first", "end")}
            sizes[f"write.{layer.kind}"] = (rows,)
            sizes |= {f"{name}.{number}": (rows, layer.kv_heads, length, layer.head_dim) for name in ("k", "v")}
        for name, size in sizes.items():
            found.setdefault(name, []).append(size)
    return {name: (low, typical, high) for name, (low, typical, high) in found.items()}

"""Files of prompts, one JSON object per line: for calibration, evaluation and benchmarks.

A line is {"prompt": TEXT}, {"messages": [{"role": ..., "content": ...}, ...]} or, for checkpoints without a tokenizer,
{"tokens": [ID, ...]}. It may carry "answer": TEXT, what the model should say.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from canvasrt.errors import InputError
from canvasrt.serve.tokenizer import TextCodec
from canvasrt.spec import ModelSpec

_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class PromptLine:
    where: str  # file and line, for messages
    messages: tuple[dict[str, str], ...]
    tokens: tuple[int, ...] = ()  # instead of messages
    answer: str | None = None


def read_prompts(file: Path) -> list[PromptLine]:
    """Raises InputError that names the file, and the line where one is at fault."""
    try:
        lines = file.read_text(encoding="utf-8").split("\n")  # JSON may hold other line ends
    except OSError as error:
        raise InputError(
            f"{file}: can't be read ({error.strerror}). It holds prompts, one JSON object per line."
        ) from None
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    prompts = [_line(f"{file}, line {number}", line) for number, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise InputError(f'{file} holds no prompts: it needs lines such as {{"prompt": "Why is the sky blue?"}}')
    return prompts


def _line(where: str, text: str) -> PromptLine:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error})") from None
    if not isinstance(content, dict) or set(content) - {"prompt", "messages", "tokens", "answer"}:
        raise InputError(f'{where}: expected an object with "prompt", "messages" or "tokens", and "answer" if known')
    forms = [key for key in ("prompt", "messages", "tokens") if key in content]
    if len(forms) != 1:
        raise InputError(f'{where}: expected one of "prompt", "messages" and "tokens"')
    answer = content.get("answer")
    if answer is not None and not isinstance(answer, str):
        raise InputError(f'{where}: "answer" must be a text')
    if forms == ["tokens"]:
        tokens = content["tokens"]
        if not isinstance(tokens, list) or not tokens or not all(type(token) is int and token >= 0 for token in tokens):
            raise InputError(f'{where}: "tokens" must be a list of token ids')
        return PromptLine(where, (), tuple(tokens), answer)
    messages = content.get("messages", [{"role": "user", "content": content.get("prompt")}])
    return PromptLine(where, tuple(check_messages(where, messages)), answer=answer)


def check_messages(where: str, messages: Any) -> list[dict[str, str]]:
    """A conversation for the chat template. Raises InputError that names ``where`` it stands."""
    if not isinstance(messages, list) or not messages or not all(_is_message(message) for message in messages):
        raise InputError(f'{where}: a message is {{"role": {" or ".join(_ROLES)}, "content": TEXT}}')
    if messages[-1]["role"] != "user":
        raise InputError(f"{where}: the last message must be the user's, which the model is to answer")
    return messages


def encode_prompts(folder: Path, spec: ModelSpec, lines: Sequence[PromptLine], room: int) -> list[NDArray[np.int32]]:
    """Token ids (n,) of each line by the chat template of the checkpoint in ``folder``.

    Raises InputError for a line that leaves no ``room`` tokens in the context, or with ids outside the vocabulary.
    """
    codec = TextCodec.load(folder) if any(line.messages for line in lines) else None
    encoded = []
    for line in lines:
        largest = max(line.tokens, default=0)  # looked at before it is made an int32, which it may not fit
        if largest >= spec.vocab_size:
            raise InputError(f"{line.where}: token id {largest} is outside the vocabulary of {spec.vocab_size}")
        tokens = np.array(line.tokens, dtype=np.int32) if codec is None or not line.messages else _chat(codec, line)
        if tokens.max() >= spec.vocab_size:
            raise InputError(f"{line.where}: token id {tokens.max()} is outside the vocabulary of {spec.vocab_size}")
        if len(tokens) + room > spec.max_context:
            raise InputError(
                f"{line.where}: {len(tokens)} tokens and {room} to generate exceed the context of {spec.max_context}"
            )
        encoded.append(tokens)
    return encoded


def _chat(codec: TextCodec, line: PromptLine) -> NDArray[np.int32]:
    try:
        return codec.encode_chat(line.messages)
    except InputError as error:
        raise InputError(f"{line.where}: {error}") from None


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict)
        and set(message) == {"role", "content"}
        and message["role"] in _ROLES
        and isinstance(message["content"], str)
    )

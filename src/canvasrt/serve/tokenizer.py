"""Text to token ids and back, by the checkpoint's own tokenizer and chat template (transformers' ``AutoTokenizer``).

Knows nothing of the model, and needs no torch.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from canvasrt.errors import CheckpointError, InputError


class TextCodec:
    """The tokenizer of one checkpoint or bundle folder."""

    def __init__(self, tokenizer: Any, folder: Path) -> None:
        self._tokenizer = tokenizer
        self._folder = folder

    @classmethod
    def load(cls, folder: Path | str) -> "TextCodec":
        """Raises CheckpointError when the folder has no tokenizer.json, or one that can't be read."""
        # Imported here: it takes a second, and token-id input needs no tokenizer.
        from transformers import AutoTokenizer

        folder = Path(folder)
        if not (folder / "tokenizer.json").is_file():
            raise CheckpointError(
                f"{folder} has no tokenizer.json: copy it, tokenizer_config.json and chat_template.jinja from the "
                "original checkpoint, or send token ids instead of text"
            )
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # the library raises whatever its parsers do
            raise CheckpointError(f"the tokenizer in {folder} can't be loaded: {error}") from error
        return cls(tokenizer, folder)

    def encode(self, text: str) -> NDArray[np.int32]:
        """Token ids (n,) of raw text. Raises InputError for text that is no valid Unicode.

        No template, no beginning-of-sequence token. Special tokens in it are recognised.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"the text holds half a character at position {error.start}: send valid Unicode") from None
        return np.array(self._tokenizer.encode(text, add_special_tokens=False), dtype=np.int32)

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> NDArray[np.int32]:
        """Token ids (n,) of a conversation, {"role", "content"} each, up to where the model's turn begins.

        Raises InputError for a role that the template does not know, CheckpointError when there is no template.
        """
        if not self._tokenizer.chat_template:
            raise CheckpointError(f"{self._folder} has no chat_template.jinja: send a raw prompt or add the template")
        try:
            text = self._tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates raise jinja2 errors with the template author's message
            raise InputError(f"the chat template refuses these messages: {error}") from error
        return self.encode(text)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of an answer: special tokens (padding, turns) left out."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))

    def pieces(self, tokens: Sequence[int]) -> list[str]:
        """Every token as a text of its own, special tokens by name: for showing a canvas, not for reading it."""
        return [str(self._tokenizer.decode([token])) for token in tokens]


def cut_at_stop(text: str, stops: Sequence[str]) -> str | None:
    """``text`` before the first stop string in it, or None when it holds none."""
    found = [position for position in (text.find(stop) for stop in stops) if position >= 0]
    return text[: min(found)] if found else None

"""The text of an answer that grows canvas by canvas, in pieces that are never taken back."""

from collections.abc import Callable, Sequence

from canvasrt.diffusion.request import RequestState
from canvasrt.serve.tokenizer import cut_at_stop

_HALF = "\ufffd"  # what half a character is decoded to
_MOST_HALVES = 8  # tokens that one character may be spread over; a model that writes U+FFFD itself waits no longer


class AnswerText:
    """Splits no character and shows no beginning of a stop text before it is known to be none."""

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stops = stops
        self._tokens: list[int] = []
        self._before = self._read = 0  # tokens[before:read] is text that was decoded last time
        self._held = ""
        self.stopped = False  # a stop text was found: there is nothing after it

    def push(self, tokens: Sequence[int], final: bool = False) -> str:
        """The text that these tokens add; with ``final``, everything that was held back too."""
        if self.stopped:
            return ""
        self._tokens += tokens
        text = self._held + self._decoded(final)
        cut = cut_at_stop(text, self._stops)
        if cut is not None:
            self.stopped = True
            self._held = ""
            return cut
        held = 0 if final else self._maybe_stop(text)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def _decoded(self, final: bool) -> str:
        """Of the new tokens. Some tokenizers write a token differently behind another, so the last ones go before."""
        known = self._decode(self._tokens[self._before : self._read])
        end = len(self._tokens)
        text = self._decode(self._tokens[self._before : end])
        least = max(self._read, end - _MOST_HALVES)
        shorter, sure = text, end
        while not final and shorter.endswith(_HALF) and sure > least:
            sure -= 1
            shorter = self._decode(self._tokens[self._before : sure])
        if not shorter.endswith(_HALF):
            text, end = shorter, sure
        if end > self._read:
            self._before, self._read = self._read, end
        return text[len(known) :]

    def _maybe_stop(self, text: str) -> int:
        """Characters at the end that a stop text may begin with."""
        longest = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:length]):
                    longest = length
                    break
        return longest


class StopText:
    """A `StopCheck`: whether an answer has reached a stop text. Called by the loop, so it has a text of its own."""

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str]) -> None:
        self._text = AnswerText(decode, stops)
        self._seen = 0

    def __call__(self, state: RequestState) -> bool:
        self._text.push(state.output[self._seen :])
        self._seen = len(state.output)
        return self._text.stopped

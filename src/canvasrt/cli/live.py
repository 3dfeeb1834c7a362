"""The terminal view of denoising: finished text plain, the canvas with settled positions bright and the rest dim.

Draws plain texts, so it does not matter whether they come from this process or from a server.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console, Group
from rich.live import Live
from rich.rule import Rule
from rich.text import Text

from canvasrt.client.tensors import Response
from canvasrt.diffusion.request import RequestState
from canvasrt.serve.tokenizer import TextCodec

# Control characters as their pictures: a model's text must not steer the terminal. Line ends and tabs stay.
_PICTURES = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n"}
_PICTURES |= {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


@dataclass(frozen=True, slots=True)
class Draft:
    """A canvas between two steps."""

    canvas: int  # from 0
    steps: int  # of the request so far
    before: str  # text of the finished canvases
    pieces: Sequence[str]  # text of every position, special tokens by name
    settled: Sequence[bool]  # positions that the last step accepted


def draft_of(response: Response, before: str) -> Draft:
    """A server's draft, behind the text of the finished canvases."""
    return Draft(
        canvas=response.canvas_index,
        steps=response.denoising_steps,
        before=before,
        pieces=response.draft_pieces,
        settled=response.draft_settled,
    )


def step_of(codec: TextCodec, state: RequestState) -> Draft:
    """The step that a request of this process has just taken."""
    draft = state.draft
    assert draft is not None, "a step leaves a draft"
    assert draft.argmax is not None
    assert draft.accepted is not None
    return Draft(
        canvas=draft.index,
        steps=state.passes,
        before=codec.decode(state.output[: draft.index * state.params.canvas]),
        pieces=codec.pieces(draft.argmax.tolist()),
        settled=draft.accepted.tolist(),
    )


def visible(text: str) -> str:
    """The text without anything that a terminal would obey."""
    return text.translate(_PICTURES)


def canvas_text(draft: Draft) -> Text:
    """The canvas in colours."""
    text = Text()
    for piece, settled in zip(draft.pieces, draft.settled, strict=True):
        special = piece.startswith("<") and piece.endswith(">") and len(piece) > 1
        text.append("·" if special else visible(piece), "bold green" if settled else "dim")
    return text


def as_line(draft: Draft) -> str:
    """For where there is no terminal: what is settled, and the canvas in one line."""
    shown = canvas_text(draft).plain.replace("\n", "\u21b5")
    return f"{sum(draft.settled):4d}/{len(draft.settled)} settled  {shown}"


class LiveView:
    """Draws the canvases of one or more requests below each other. ``seconds`` is the time spent drawing and waiting.

    Without a terminal it prints one line per step instead of redrawing.
    """

    def __init__(self, requests: int, delay: float) -> None:
        self._delay = delay
        self._console = Console()
        self._panels = [Group() for _ in range(requests)]
        self._live = Live(console=self._console, auto_refresh=False) if self._console.is_terminal else None
        if self._live:
            self._live.start()
        self.seconds = 0.0

    def show(self, request: int, draft: Draft) -> None:
        """A step of a request, by its number from 0."""
        started = time.perf_counter()
        if self._live:
            title = self._title(request, f"canvas {draft.canvas + 1}, step {draft.steps}")
            self._panels[request] = Group(title, Text(visible(draft.before), end=""), canvas_text(draft))
            self._draw(self._live)
        else:
            self._console.print(Text(f"{request + 1}.{draft.canvas + 1} {as_line(draft)}"))
        self.seconds += time.perf_counter() - started

    def end(self, request: int, text: str) -> None:
        """The whole answer to a request."""
        started = time.perf_counter()
        self._panels[request] = Group(self._title(request, "done"), Text(visible(text)))
        if self._live:
            self._draw(self._live)
        else:
            self._console.print(self._panels[request])
        self.seconds += time.perf_counter() - started

    def close(self) -> None:
        if self._live:
            self._live.stop()

    def _title(self, request: int, state: str) -> Rule:
        name = f"request {request + 1}, " if len(self._panels) > 1 else ""
        return Rule(name + state, align="left", style="dim")

    def _draw(self, live: Live) -> None:
        live.update(Group(*self._panels), refresh=True)
        time.sleep(self._delay)

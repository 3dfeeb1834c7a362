"""The terminal view of denoising: finished text plain, the canvas with settled positions bright and the rest dim."""

import time

from rich.console import Console, Group
from rich.live import Live
from rich.rule import Rule
from rich.text import Text

from canvasrt.diffusion.canvas import CanvasState
from canvasrt.runtime.generate import Event
from canvasrt.serve.tokenizer import TextCodec


class LiveView:
    """Draws the events of one or more requests below each other. ``seconds`` is the time spent drawing and waiting.

    Without a terminal it prints one line per step instead of redrawing.
    """

    def __init__(self, codec: TextCodec, requests: int, delay: float) -> None:
        self._codec = codec
        self._delay = delay
        self._console = Console()
        self._panels = [Group() for _ in range(requests)]
        self._live = Live(console=self._console, auto_refresh=False) if self._console.is_terminal else None
        if self._live:
            self._live.start()
        self.seconds = 0.0

    def update(self, event: Event) -> None:
        started = time.perf_counter()
        if event.kind == "step" and event.state.draft is not None:
            draft = event.state.draft
            before = event.state.output[: draft.index * event.state.params.canvas]
            self._panels[event.request] = self._panel(before, draft, event.state.passes, event.request)
            self._draw(event.request, draft)
        elif event.kind == "end":
            self._panels[event.request] = Group(
                self._title(event.request, "done"), Text(self._codec.decode(event.state.output))
            )
            self._draw(event.request, None)
        self.seconds += time.perf_counter() - started

    def close(self) -> None:
        if self._live:
            self._live.stop()

    def _panel(self, before: tuple[int, ...], draft: CanvasState, passes: int, request: int) -> Group:
        title = self._title(request, f"canvas {draft.index + 1}, step {passes}")
        return Group(title, Text(self._codec.decode(before), end=""), self._canvas(draft))

    def _title(self, request: int, state: str) -> Rule:
        name = f"request {request + 1}, " if len(self._panels) > 1 else ""
        return Rule(name + state, align="left", style="dim")

    def _canvas(self, draft: CanvasState) -> Text:
        text = Text()
        assert draft.argmax is not None, "a draft has been through a step"
        assert draft.accepted is not None
        for piece, settled in zip(self._codec.pieces(draft.argmax.tolist()), draft.accepted, strict=True):
            special = piece.startswith("<") and piece.endswith(">") and len(piece) > 1
            text.append("·" if special else piece, "bold green" if settled else "dim")
        return text

    def _draw(self, request: int, draft: CanvasState | None) -> None:
        if self._live:
            self._live.update(Group(*self._panels), refresh=True)
            time.sleep(self._delay)
        elif draft is not None and draft.accepted is not None:
            shown = self._canvas(draft).plain.replace("\n", "\u21b5")
            self._console.print(
                Text(
                    f"{request + 1}.{draft.index + 1} {int(draft.accepted.sum()):4d}/{len(draft.accepted)} settled  "
                    f"{shown}"
                )
            )
        elif self._panels:
            self._console.print(self._panels[request])

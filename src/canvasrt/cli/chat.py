"""``canvasrt chat``: a conversation with a server, in the terminal or through a pipe."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from canvasrt.cli.live import Draft, as_line, canvas_text, draft_of, visible
from canvasrt.errors import CanvasRTError, InputError

if TYPE_CHECKING:
    from canvasrt.client.connection import Client

PROMPT = "> "
EXIT, NEW = "/exit", "/new"
HELP = f"Ctrl-C stops an answer, {NEW} forgets the conversation, {EXIT} or Ctrl-D ends. A line that ends in \\ goes on."
SEEDS = 2**64

Message = dict[str, str]


def chat(
    url: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="The server's gRPC address.")
    ] = "localhost:8001",  # Triton's own default
    live: Annotated[bool, typer.Option("--live", help="Show each canvas while it is denoised.")] = False,
    system: Annotated[str | None, typer.Option(help="A system message before the conversation.")] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of the first answer; each next one has the next seed.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Most tokens of an answer.")] = None,
) -> None:
    """Talk with the model behind a server: it sees the whole conversation. Reads lines from a pipe too."""
    from canvasrt.client.connection import Client  # here: gRPC may be missing

    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    with Client(url) as client:
        client.ping()
        talk = Conversation(client, live, system, seed, max_tokens)
        if interactive:
            import readline  # noqa: F401  # gives input() editing and history

            typer.echo(HELP, err=True)
        while (text := _read(interactive)) is not None:
            if text == NEW:
                talk.forget()
            elif text.strip():
                _turn(talk, text, interactive)


def _turn(talk: "Conversation", text: str, interactive: bool) -> None:
    """One question and its answer. What goes wrong ends a pipe, but not a conversation with a person."""
    try:
        talk.say(text)
    except KeyboardInterrupt:
        if not interactive:
            raise
        typer.echo("(stopped; this question is forgotten)", err=True)
    except CanvasRTError as error:
        if not interactive:
            raise
        typer.echo(f"error: {visible(str(error))}", err=True)


class Conversation:
    """The messages so far, and how an answer is shown."""

    def __init__(
        self, client: "Client", live: bool, system: str | None, seed: int | None, max_tokens: int | None
    ) -> None:
        self._client = client
        self._live = live
        self._system: list[Message] = [{"role": "system", "content": system}] if system else []
        self._messages: list[Message] = []
        self._seed = seed
        self._max_tokens = max_tokens
        self._turns = 0

    def forget(self) -> None:
        self._messages = []

    def say(self, text: str) -> None:
        """Asks, and shows the answer as it comes. Only an answer that is complete becomes part of the conversation."""
        question: Message = {"role": "user", "content": text}
        seed = None if self._seed is None else (self._seed + self._turns) % SEEDS
        answer = ""
        responses = self._client.generate(
            messages=[*self._system, *self._messages, question],
            seed=seed,
            max_tokens=self._max_tokens,
            stream_drafts=1 if self._live else None,
        )
        with responses, AnswerView(self._live) as view:
            for response in responses:
                if response.is_draft:
                    view.draft(draft_of(response, ""))
                else:
                    answer += response.text_output
                    view.text(response.text_output)
        self._messages += [question, {"role": "assistant", "content": answer}]
        self._turns += 1


class AnswerView:
    """Writes an answer's text as it becomes final and, with ``live``, the canvas in work below it.

    On a terminal the canvas is redrawn in place together with the line that it continues, so a line is written when it
    is complete. Elsewhere there is a line for every step.
    """

    def __init__(self, live: bool) -> None:
        self._console = Console()
        self._live = live
        self._redraw = live and self._console.is_terminal
        self._line = ""  # the last line so far, where it is redrawn with the canvas
        self._region: Live | None = None
        self._ended = True  # the cursor stands at the beginning of a line

    def __enter__(self) -> "AnswerView":
        return self

    def __exit__(self, *error: object) -> None:
        self._close()
        if self._line:
            self._write(self._line)
        if not self._ended:
            self._write("\n")

    def text(self, text: str) -> None:
        if self._redraw:
            self._close()
            lines, end, rest = (self._line + text).rpartition("\n")
            self._write(lines + end)
            self._line = rest
        else:
            self._write(text)

    def draft(self, draft: Draft) -> None:
        if not self._live:
            return
        if not self._redraw:
            self._write("" if self._ended else "\n")
            self._write(f"{as_line(draft)}\n")
            return
        if self._region is None:
            self._region = Live(console=self._console, auto_refresh=False, transient=True)
            self._region.start()
        self._region.update(Group(Text(visible(self._line)) + canvas_text(draft)), refresh=True)

    def _close(self) -> None:
        if self._region is not None:
            self._region.stop()
            self._region = None

    def _write(self, text: str) -> None:
        """Through a pipe as it is: a program reads it."""
        if text:
            self._ended = text.endswith("\n")
            sys.stdout.write(visible(text) if self._console.is_terminal else text)
            sys.stdout.flush()


def _read(interactive: bool) -> str | None:
    """What the user says, or None at the end. From a pipe a line, without a prompt."""
    lines: list[str] = []
    while True:
        try:
            line = input("" if not interactive else "  " if lines else PROMPT)
            line.encode()  # Python may have let half characters through
        except EOFError:
            if interactive:
                typer.echo()
            return "\n".join(lines) if lines else None
        except KeyboardInterrupt:
            if not interactive:
                raise
            typer.echo(f"\n({EXIT} or Ctrl-D ends)", err=True)
            lines = []
            continue
        except UnicodeError as error:
            raise InputError(f"standard input is no UTF-8 text: {error}") from None
        if not lines and line.strip() == EXIT:
            return None
        lines.append(line.removesuffix("\\"))
        if not line.endswith("\\"):
            return "\n".join(lines)

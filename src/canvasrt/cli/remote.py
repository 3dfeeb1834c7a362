"""``canvasrt generate --url``: the same prompts, options and figures, answered by a server."""

import queue
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from canvasrt.cli.live import LiveView, draft_of
from canvasrt.client.connection import Client, Stream
from canvasrt.client.tensors import Response
from canvasrt.client.waiting import wait_for
from canvasrt.diffusion.params import RequestOptions
from canvasrt.errors import CanvasRTError, InputError

LEAST_TIMEOUT, MOST_TIMEOUT = 0.001, 4_000_000  # seconds


@dataclass(slots=True)
class Answer:
    """What the responses to one request add up to."""

    text: str = ""
    output_tokens: int = 0
    last: Response | None = None  # the last one that is no draft
    seconds: float = 0.0

    def add(self, response: Response) -> None:
        self.text += response.text_output
        self.output_tokens += response.num_output_tokens
        self.last = response

    def figures(self) -> dict[str, object]:
        """By the names that `canvasrt generate --json` uses. The tokens of the speeds are those that were delivered."""
        assert self.last is not None, "an answer ends with a response"
        return {
            "text": self.text,
            "finish_reason": self.last.finish_reason,
            "seed": self.last.seed,
            "prompt_tokens": self.last.num_input_tokens,
            "cached_tokens": self.last.num_cached_tokens,
            "output_tokens": self.output_tokens,
            "canvases": self.last.canvas_index + 1,
            "denoising_steps": self.last.denoising_steps,
            "tokens_per_forward": round(self.output_tokens / self.last.denoising_steps, 2),
            "tokens_per_second": round(self.output_tokens / self.seconds, 1),
            "seconds": round(self.seconds, 4),
        }


def inputs_of(options: RequestOptions, timeout: float | None) -> dict[str, object]:
    """A request's options by their names on the wire; None for those that were not given.

    Raises InputError for a timeout that is none.
    """
    if timeout is not None and not LEAST_TIMEOUT <= timeout <= MOST_TIMEOUT:
        raise InputError(f"--timeout {timeout:g}: {LEAST_TIMEOUT:g} to {MOST_TIMEOUT:,} seconds expected")
    given = options.model_dump(exclude_unset=True)
    names = {"stop": "stop_words"}
    inputs = {names.get(name, name): value for name, value in given.items() if value is not None and value != ()}
    return {**inputs, "timeout_ms": None if timeout is None else round(timeout * 1000)}


def generate_at(url: str, requests: Sequence[Mapping[str, Any]], live: bool, delay: float) -> list[dict[str, object]]:
    """The figures of all answers, in the order of the requests, which run together."""
    answers = [Answer() for _ in requests]
    with Client(url) as client:
        view = LiveView(len(requests), delay) if live else None
        try:
            for index, response, seconds in _together(client, requests, 1 if live else None):
                answer = answers[index]
                if not response.is_draft:
                    answer.add(response)
                    answer.seconds = seconds
                if view and response.is_draft:
                    view.show(index, draft_of(response, answer.text))
                elif view and response.finish_reason:
                    view.end(index, answer.text)
        finally:
            if view:
                view.close()  # else an interrupted command leaves the terminal without a cursor
    return [answer.figures() for answer in answers]


def _together(
    client: Client, requests: Sequence[Mapping[str, Any]], drafts: int | None
) -> Iterator[tuple[int, Response, float]]:
    """The responses of all requests as they come, with the request's number and the seconds since it was sent.

    Raises the first error of any; however it ends, nothing runs on at the server.
    """
    news: queue.SimpleQueue[tuple[int, Response | CanvasRTError | None, float]] = queue.SimpleQueue()

    def read(index: int, stream: Stream) -> None:
        started = time.perf_counter()
        try:
            for response in stream:
                news.put((index, response, time.perf_counter() - started))
            news.put((index, None, 0.0))
        except CanvasRTError as error:
            news.put((index, error, 0.0))

    with ExitStack() as streams:
        for index, inputs in enumerate(requests):
            stream = streams.enter_context(client.generate(stream_drafts=drafts, **inputs))
            threading.Thread(target=read, args=(index, stream), daemon=True).start()
        running = len(requests)
        while running:
            index, response, seconds = wait_for(news)
            if isinstance(response, CanvasRTError):
                raise response
            if response is None:
                running -= 1
            else:
                yield index, response, seconds

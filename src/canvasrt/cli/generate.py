"""``canvasrt generate``: answers one or more prompts in this process, in one batch, or at a server."""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray

from canvasrt.bundle.reader import read_manifest
from canvasrt.bundle.staging import is_bundle
from canvasrt.checkpoint import Checkpoint
from canvasrt.cli.common import Device, Dtype, Exact, Json, context_for, open_engine, open_runner, params_for
from canvasrt.cli.live import LiveView, step_of
from canvasrt.diffusion.params import GenerationConfig, RequestOptions, RequestParams
from canvasrt.diffusion.request import RequestState
from canvasrt.errors import InputError
from canvasrt.runtime.generate import run_requests
from canvasrt.runtime.open_bundle import BundleOptions
from canvasrt.runtime.protocol import EngineRunner
from canvasrt.serve.tokenizer import TextCodec, cut_at_stop
from canvasrt.spec import ModelSpec


def generate(
    checkpoint: Annotated[
        Path | None,
        typer.Argument(
            metavar="[MODEL]", help="Folder of a DiffusionGemma checkpoint or an engine bundle; not with --url."
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", help="The user's message; repeat it for a batch; - reads stdin."),
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Take the prompt as it is, without the chat template.")] = False,
    system: Annotated[str | None, typer.Option(help="A system message before each prompt.")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Same seed, same text. Drawn at random and printed by default.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens to generate; cuts inside a canvas.")] = None,
    steps: Annotated[int | None, typer.Option(help="Most denoising steps per canvas.")] = None,
    t_min: Annotated[
        float | None, typer.Option(help="Temperature that the schedule falls to with the remaining steps.")
    ] = None,
    t_max: Annotated[float | None, typer.Option(help="Temperature at the first step.")] = None,
    entropy_bound: Annotated[
        float | None, typer.Option(help="Entropy in nats up to which a step accepts tokens.")
    ] = None,
    stability_threshold: Annotated[
        int | None, typer.Option(help="Earlier steps whose draft must equal this one's before a canvas stops.")
    ] = None,
    confidence_threshold: Annotated[
        float | None, typer.Option(help="Mean entropy in nats below which a canvas may stop.")
    ] = None,
    top_k: Annotated[int, typer.Option(help="Sample among the k likeliest tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample among the likeliest tokens of this total probability.")] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="End the answer before this text; repeatable.")] = None,
    stop_token_id: Annotated[list[int] | None, typer.Option(help="End the answer at this token; repeatable.")] = None,
    context: Annotated[
        int | None, typer.Option(help="Context tokens to reserve; what the request needs by default.")
    ] = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    exact: Exact = False,
    weights: Annotated[
        Path | None, typer.Option("--checkpoint", help="For a bundle without weights: the checkpoint that has them.")
    ] = None,
    live: Annotated[bool, typer.Option("--live", help="Show the canvas while it is denoised.")] = False,
    delay: Annotated[float, typer.Option(min=0, max=10, help="Seconds to show each step for with --live.")] = 0.1,
    url: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Ask the server with this gRPC address instead.")
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(help="Seconds after which the server gives the request up; with --url.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Answer prompts with a checkpoint or an engine bundle, on this machine and in this process, or at a server."""
    options = RequestOptions.parse(
        seed=seed, max_tokens=max_tokens, max_denoising_steps=steps, t_min=t_min, t_max=t_max,
        entropy_bound=entropy_bound, stability_threshold=stability_threshold,
        confidence_threshold=confidence_threshold, top_k=top_k, top_p=top_p, stop=tuple(stop or ()),
        stop_token_ids=tuple(stop_token_id or ()),
    )  # fmt: skip
    if live and as_json:
        raise InputError("--live draws on the terminal and --json writes for programs: choose one")
    if url is not None:
        _refuse_local(checkpoint, weights, context, device, dtype, exact)
        from canvasrt.cli.remote import generate_at, inputs_of  # here: gRPC may be missing

        shared = inputs_of(options, timeout)
        wanted = [{**shared, **_as_input(text, system, raw)} for text in _texts(prompt)]
        answers = generate_at(url, wanted, live, delay)
    else:
        if checkpoint is None:
            raise InputError("name a checkpoint's folder, or a server with --url HOST:PORT")
        if timeout is not None:
            raise InputError("--timeout is for a server: give --url too, or leave it out")
        local = _Bundle(checkpoint, weights) if is_bundle(checkpoint) else _Checkpoint(checkpoint, device, dtype, exact)
        spec, codec = local.spec, TextCodec.load(checkpoint)
        config = GenerationConfig.load(checkpoint)
        prompts = [_tokens(codec, text, system, raw) for text in _texts(prompt)]
        if any((tokens == spec.image_token_id).any() for tokens in prompts):
            raise InputError("the prompt holds image tokens, and this version reads text only: remove them")
        room = local.context if context is None else context
        params = [params_for(spec, config, options, tokens, room) for tokens in prompts]
        runner = local.runner(len(prompts), context, context_for(prompts, params))
        answers = _run(runner, codec, prompts, params, LiveView(len(prompts), delay) if live else None)
    for answer in answers:
        _print(answer, as_json, live)


class _Checkpoint:
    """Run by torch."""

    def __init__(self, folder: Path, device: str, dtype: str, exact: bool) -> None:
        self._source = Checkpoint.open(folder)
        self._how = (device, dtype)
        self._exact = exact
        self.spec = self._source.spec
        self.context = self.spec.max_context

    def runner(self, slots: int, context: int | None, needed: int) -> EngineRunner:
        return open_runner(self._source, *self._how, slots, context, needed, self._exact)


class _Bundle:
    """Run by TensorRT on this machine's GPU."""

    def __init__(self, folder: Path, weights: Path | None) -> None:
        self._folder, self._weights = folder, weights
        self._shapes = read_manifest(folder).shapes
        self.spec = ModelSpec.load(folder)
        self.context = self._shapes.context

    def runner(self, slots: int, context: int | None, needed: int) -> EngineRunner:
        if context not in (None, self.context):
            raise InputError(f"{self._folder} was built for a context of {self.context} tokens: leave --context out")
        options = BundleOptions(checkpoint=self._weights, slots=max(slots, self._shapes.canvases), verify="sizes")
        return open_engine(self._folder, options).runner


def _run(
    runner: EngineRunner,
    codec: TextCodec,
    prompts: Sequence[NDArray[np.int32]],
    params: Sequence[RequestParams],
    view: LiveView | None,
) -> list[dict[str, object]]:
    """The answers in the order of the prompts, which run together."""
    requests = {
        index: RequestState.new(each, tokens) for index, (each, tokens) in enumerate(zip(params, prompts, strict=True))
    }
    texts: dict[int, str] = {}

    def stops(index: int, state: RequestState) -> bool:
        cut = cut_at_stop(codec.decode(state.output), state.params.stop)
        if cut is not None:
            texts[index] = cut
        return cut is not None

    def text(index: int, state: RequestState) -> str:
        return texts.get(index, codec.decode(state.output))

    ends: dict[int, tuple[RequestState, float]] = {}
    started = time.perf_counter()
    try:
        for event in run_requests(runner, requests, stops if params[0].stop else None):
            if event.kind == "end":
                shown = view.seconds if view else 0.0
                ends[event.request] = (event.state, time.perf_counter() - started - shown)
                if view:
                    view.end(event.request, text(event.request, event.state))
            elif view and event.kind == "step":
                view.show(event.request, step_of(codec, event.state))
    finally:
        if view:
            view.close()  # else an interrupted command leaves the terminal without a cursor
    return [
        _answer(text(index, state), state, len(prompts[index]), seconds)
        for index, (state, seconds) in sorted(ends.items())
    ]


def _refuse_local(
    model: Path | None, weights: Path | None, context: int | None, device: str, dtype: str, exact: bool
) -> None:
    """What only this process could heed."""
    given = {
        "MODEL": model is not None, "--checkpoint": weights is not None, "--context": context is not None,
        "--device": device != "cpu", "--dtype": dtype != "float32", "--exact": exact,
    }  # fmt: skip
    if wrong := [name for name, there in given.items() if there]:
        raise InputError(f"the server behind --url decides on its model: leave {', '.join(wrong)} out")


def _texts(prompts: list[str] | None) -> list[str]:
    if not prompts:
        raise InputError("no prompt: give --prompt TEXT, or --prompt - to read standard input")
    return [sys.stdin.read() if text == "-" else text for text in prompts]


def _tokens(codec: TextCodec, text: str, system: str | None, raw: bool) -> NDArray[np.int32]:
    return codec.encode(_some(text)) if raw else codec.encode_chat(_messages(text, system))


def _as_input(text: str, system: str | None, raw: bool) -> dict[str, object]:
    """A prompt by its name on the wire."""
    return {"text_input": _some(text)} if raw else {"messages": _messages(text, system)}


def _messages(text: str, system: str | None) -> list[dict[str, str]]:
    before = [{"role": "system", "content": system}] if system else []
    return [*before, {"role": "user", "content": _some(text)}]


def _some(text: str) -> str:
    if not text.strip():
        raise InputError("the prompt is empty: give some text")
    return text


def _answer(text: str, state: RequestState, prompt_tokens: int, seconds: float) -> dict[str, object]:
    return {
        "text": text,
        "finish_reason": state.finish_reason,
        "seed": state.params.seed,
        "prompt_tokens": prompt_tokens,
        "output_tokens": len(state.output),
        "canvases": state.canvas.index + 1,
        "denoising_steps": state.passes,
        "tokens_per_forward": round(state.generated / state.passes, 2),
        "tokens_per_second": round(state.generated / seconds, 1),
        "seconds": round(seconds, 4),
    }


def _print(answer: dict[str, object], as_json: bool, live: bool) -> None:
    if as_json:
        typer.echo(json.dumps(answer, ensure_ascii=False))
        return
    if not live:
        typer.echo(answer["text"])
    typer.echo(
        f"[{answer['finish_reason']}] {answer['output_tokens']} tokens, {answer['canvases']} canvases, "
        f"{answer['denoising_steps']} steps, {answer['tokens_per_forward']} tokens per forward, "
        f"{answer['tokens_per_second']} tokens/s, seed {answer['seed']}",
        err=True,
    )

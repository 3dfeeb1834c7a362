"""The service below Triton: answers, drafts, cancellation, failures and figures, over a runner without a network."""

import threading
import time
from typing import Any

import numpy as np
import pytest

from canvasrt import wire
from canvasrt.diffusion.request import RequestState
from canvasrt.runtime.fake import FakeRunner
from canvasrt.runtime.generate import run_requests
from canvasrt.serve.intake import read_request
from canvasrt.serve.metrics import Metrics
from canvasrt.serve.responses import as_arrays, ping_response
from service import Asked, Gate, desk, fake, served, tensors

LONG = {"input_ids": [5, 6, 7], "max_tokens": 200, "ignore_eos": True, "seed": 3}


def expected(values: dict[str, Any]) -> RequestState:
    """By the loop of the command line."""
    runner = fake()
    asked = read_request(tensors(**values), {}, served(runner))
    state = RequestState.new(asked.params, asked.prompt)
    return next(event.state for event in run_requests(runner, {0: state}) if event.kind == "end")


def text_of(state: RequestState) -> str:
    codec = served(fake()).codec
    assert codec is not None
    return codec.decode(state.output)


def test_without_streaming_there_is_one_response_with_everything() -> None:
    with desk() as made:
        asked = made.ask(Asked(**LONG)).wait()
    (response,) = asked.said
    state = expected(LONG)
    assert response.text == text_of(state)
    assert (response.finish_reason, response.output_tokens, response.input_tokens) == ("length", 200, 3)
    assert (response.canvas, response.steps, response.seed) == (4, state.passes, 3)
    assert not response.is_draft


def test_a_stream_has_a_response_for_each_canvas_and_they_add_up() -> None:
    with desk() as made:
        asked = made.ask(Asked(stream=True, **LONG)).wait()
    assert asked.text == text_of(expected(LONG))
    assert [response.canvas for response in asked.said] == [0, 1, 2, 3, 4]
    assert [response.output_tokens for response in asked.said] == [48, 48, 48, 48, 8]
    assert [response.finish_reason for response in asked.said] == ["", "", "", "", "length"]


def test_drafts_come_every_so_many_steps_between_the_canvases() -> None:
    with desk() as made:
        asked = made.ask(Asked(stream=True, stream_drafts=2, **LONG)).wait()
    drafts = [response for response in asked.said if response.is_draft]
    assert drafts
    assert asked.text == text_of(expected(LONG))
    for draft in drafts:
        assert len(draft.pieces) == len(draft.settled) == 48
        assert (draft.output_tokens, draft.finish_reason) == (0, "")
    whole = ""
    for response in asked.said:
        if response.is_draft:
            assert response.text.startswith(whole)
            assert response.canvas == len(
                whole and [1 for each in asked.said if not each.is_draft and each.canvas < response.canvas]
            )
        else:
            whole += response.text


def test_many_at_once_get_what_they_would_get_alone() -> None:
    requests = [{"input_ids": [5 + n % 3] * (1 + 7 * n), "seed": n, "max_tokens": 10 + 9 * n} for n in range(12)]
    with desk(max_waiting=20) as made:
        asked = [made.ask(Asked(stream=n % 2 == 0, **values)) for n, values in enumerate(requests)]
        assert [each.wait().text for each in asked] == [text_of(expected(values)) for values in requests]
        assert made.settles("requests_running", 0)


def test_stop_words_end_the_answer_before_them_also_across_canvases() -> None:
    text = text_of(expected(LONG))
    for place in (60, len(text) // 2, 46):
        stop = text[place : place + 5]
        with desk() as made:
            asked = made.ask(Asked(stream=True, stop_words=[stop], **LONG)).wait()
        assert asked.text == text[: text.index(stop)]
        assert asked.said[-1].finish_reason == "stop"


def test_a_text_before_the_answer_where_it_is_asked_for() -> None:
    values: dict[str, Any] = {"text_input": "12.", "seed": 1, "max_tokens": 60, "ignore_eos": True}
    with desk() as made:
        plain = made.ask(Asked(stream=True, **values)).wait().text
        echoed = made.ask(Asked(stream=True, exclude_input_in_output=False, **values)).wait().text
    assert echoed == "12." + plain


def test_a_refused_request_is_told_why_and_disturbs_nobody() -> None:
    with desk() as made:
        long = made.ask(Asked(stream=True, **LONG))
        bad = made.ask(Asked(input_ids=[5000])).wait()
        assert bad.failure is not None
        assert bad.failure[0] == wire.INVALID
        assert "outside the vocabulary" in bad.failure[1]
        assert long.wait().text == text_of(expected(LONG))
        assert made.settles("requests_total", 1, wire.INVALID)


def test_a_full_queue_is_told_at_once() -> None:
    runner = Gate(canvas=48, vocabulary=112, context=512, slots=1)
    with desk(runner, max_waiting=2) as made:
        asked = [made.ask(Asked(**LONG)) for _ in range(6)]
        refused = [each for each in asked[3:] if each.wait().failure]
        assert [each.failure[0] for each in refused if each.failure] == [wire.BUSY] * 3
        runner.open.set()
        runner.steps.release(10)
        assert {each.wait().text for each in asked[:3]} == {text_of(expected(LONG))}


@pytest.mark.parametrize("phase", ["waiting", "running"])
def test_a_client_that_goes_frees_its_slot(phase: str) -> None:
    runner = Gate(canvas=48, vocabulary=112, context=512, slots=1)
    with desk(runner) as made:
        first = made.ask(Asked(stream=True, **LONG))
        second = made.ask(Asked(stream=True, **{**LONG, "seed": 4}))
        gone, other = (first, second) if phase == "running" else (second, first)
        runner.steps.release(1)
        gone.gone.set()
        time.sleep(0.2)
        runner.open.set()
        runner.steps.release(1)
        assert gone.wait().failure == (wire.CANCELLED, gone.failure[1] if gone.failure else "")
        assert other.wait().text == text_of(expected({**LONG, "seed": 3 if other is first else 4}))
        assert made.settles("requests_running", 0)


@pytest.mark.parametrize("how", ["input", "server"])
def test_a_request_that_takes_too_long_is_given_up(how: str) -> None:
    runner = Gate(canvas=48, vocabulary=112, context=512, slots=1)
    with desk(runner) as made:
        late = Asked(timeout_ms=100, **LONG) if how == "input" else Asked(timeout=0.1, **LONG)
        made.ask(late)
        time.sleep(0.3)
        runner.open.set()
        runner.steps.release(2)
        assert late.wait().failure is not None
        assert late.failure is not None
        assert late.failure[0] == wire.TIMED_OUT
        assert made.ask(Asked(**LONG)).wait().text == text_of(expected(LONG))


class Faulty(FakeRunner):
    """Fails in the step of one prompt's canvas."""

    def denoise(self, rows: Any, meanwhile: Any = None) -> Any:
        if any(13 in self._contexts[row.slot][:1] for row in rows):
            raise RuntimeError("the device said no")
        return super().denoise(rows)


def test_a_runner_that_fails_fails_those_requests_and_serves_on() -> None:
    with desk(Faulty(canvas=48, vocabulary=112, context=512, slots=2)) as made:
        for _ in range(3):
            bad = made.ask(Asked(input_ids=[13])).wait()
            assert bad.failure == (wire.FAILED, "RuntimeError: the device said no")
            assert made.ask(Asked(**LONG)).wait().text == text_of(expected(LONG))
        assert made.settles("requests_total", 3, wire.FAILED)
        assert made.value("requests_running") == 0


class Unreleasable(FakeRunner):
    def encode(self, rows: Any) -> None:
        raise RuntimeError("first fault")

    def release(self, slot: int) -> None:
        raise RuntimeError("the device is lost")


def test_a_runner_that_is_lost_is_said_to_everybody_and_to_a_ping() -> None:
    with desk(Unreleasable(canvas=48, vocabulary=112, context=512, slots=1)) as made:
        assert made.ask(Asked(ping=True)).wait().text == "alive"
        assert made.ask(Asked(**LONG)).wait().failure is not None
        until = time.monotonic() + 10
        while (ping := made.ask(Asked(ping=True)).wait()).failure is None and time.monotonic() < until:
            time.sleep(0.02)
        assert ping.failure == (wire.FAILED, "the canvas loop can't be used: the device is lost")
        after = made.ask(Asked(**LONG)).wait()
        assert after.failure is not None
        assert after.failure[0] == wire.BUSY
        assert "must be restarted: the device is lost" in after.failure[1]


def test_a_client_whose_response_can_not_be_sent_ends_no_thread() -> None:
    class Broken(Asked):
        def send(self, response: Any, final: bool) -> None:
            raise OSError("broken pipe")

    with desk() as made:
        made.ask(Broken(stream=True, **LONG))
        assert made.ask(Asked(**LONG)).wait().text == text_of(expected(LONG))
        assert made.settles("requests_running", 0)


def test_closing_lets_running_requests_end_and_cancels_the_rest() -> None:
    runner = Gate(canvas=48, vocabulary=112, context=512, slots=1)
    with desk(runner) as made:
        asked = [made.ask(Asked(**LONG)) for _ in range(2)]
        runner.steps.release(1)
        assert made.settles("requests_running", 1)
        closing = threading.Thread(target=made.service.close, args=(0.3,))
        closing.start()
        time.sleep(0.4)
        runner.steps.release(2)
        closing.join(20)
        assert not closing.is_alive()
        assert [each.wait().failure and each.wait().failure[0] for each in asked] == [wire.CANCELLED] * 2
        late = made.ask(Asked(**LONG)).wait()
        assert late.failure is not None
        assert late.failure[0] == wire.BUSY


def test_every_request_ends_once_whatever_happens_to_it() -> None:
    """200 of every kind at once, from many threads; then nothing is left and the figures add up."""
    rng = np.random.default_rng(0)
    with desk(fake(slots=4), max_waiting=500) as made:
        asked: list[Asked] = []
        for number in range(200):
            values: dict[str, Any] = {
                "input_ids": rng.integers(0, 112, rng.integers(1, 100)).tolist(),
                "max_tokens": int(rng.integers(1, 150)),
                "stream": bool(rng.random() < 0.5),
                "priority_level": int(rng.integers(0, 6)),
            }
            if number % 7 == 0:
                values["input_ids"] = [5000]
            if number % 11 == 0:
                values["timeout_ms"] = 1
            asked.append(Asked(**values))
        threads = [
            threading.Thread(target=lambda part=part: [made.ask(each) for each in asked[part::8]]) for part in range(8)
        ]
        for thread in threads:
            thread.start()
        for each in asked[5::13]:
            each.gone.set()
        for thread in threads:
            thread.join()
        assert [each.wait(60).ends for each in asked] == [1] * 200
        assert made.settles("requests_running", 0)
        assert made.settles("requests_waiting", 0)
        made.service.close(10)  # writes what was not written yet
        outcomes = {key[1]: metric.value for key, metric in made.metrics.items() if key[0] == "canvasrt_requests_total"}
        assert sum(outcomes.values()) == 200
        assert made.value("kv_used_tokens") == 0
        kinds = {each.failure[0] for each in asked if each.failure}
        assert {wire.INVALID} <= kinds <= {wire.INVALID, wire.TIMED_OUT, wire.CANCELLED}


def test_the_next_turn_of_a_conversation_finds_its_prefix() -> None:
    with desk() as made:
        prompt = [5, 6, 7, 8] * 15
        first = made.ask(Asked(input_ids=prompt, seed=1)).wait()
        second = made.ask(Asked(input_ids=[*prompt, 7, 8], seed=2)).wait()
        assert (first.said[-1].cached_tokens, second.said[-1].cached_tokens) == (0, 60)
        assert made.settles("prefix_cache_tokens_total", 60)
        assert made.value("prefix_cache_hits_total") == 1
    with desk(reuse_prefixes=False) as made:
        made.ask(Asked(input_ids=prompt, seed=1)).wait()
        alone = made.ask(Asked(input_ids=[*prompt, 7, 8], seed=2)).wait()
        assert (alone.said[-1].cached_tokens, alone.text) == (0, second.text)


def test_a_model_that_is_loaded_again_goes_on_counting_and_forgets_lost_requests() -> None:
    """Triton keeps the time series of a model that died."""
    runner = Gate(canvas=48, vocabulary=112, context=512, slots=2)
    with desk(runner) as made:
        lost = [made.ask(Asked(**LONG)) for _ in range(3)]
        runner.steps.release(3)
        assert made.settles("requests_running", 2)
        assert made.value("requests_total", "server error") == 0
        assert ("canvasrt_requests_total", "busy") in made.metrics  # a rate can be taken of the very first one
        Metrics(made._metric, 2, 512)
        assert made.value("requests_running") == made.value("requests_waiting") == made.value("kv_used_tokens") == 0
        assert made.value("model_loads_total") == 2
        for each in lost:
            each.gone.set()


def test_the_figures_say_what_happened() -> None:
    with desk() as made:
        asked = made.ask(Asked(stream=True, **LONG)).wait()
        assert made.settles("requests_total", 1, "length")
        state = expected(LONG)
        assert made.value("output_tokens_total") == 200
        assert made.value("canvases_total") == 5
        assert made.settles("denoising_steps_total", state.passes)
        assert made.value("slots") == 4
        assert made.value("kv_capacity_tokens") == 4 * 512
        assert made.metrics[("canvasrt_steps_per_canvas",)].observed == [
            after.steps - before
            for after, before in zip(asked.said, [0, *(each.steps for each in asked.said)], strict=False)
        ]
        assert len(made.metrics[("canvasrt_first_canvas_seconds",)].observed) == 1
        assert len(made.metrics[("canvasrt_canvas_seconds",)].observed) == 4
        event, fields = made.lines.get(timeout=5)
        assert (event, fields["request"], fields["outcome"], fields["output_tokens"]) == (
            "ended",
            "asked",
            "length",
            200,
        )


def test_a_line_of_the_log_tells_when_its_request_ended_not_when_it_was_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("canvasrt.serve.service._FLUSH_SECONDS", 1000.0)  # written when the service is closed
    began = time.time()
    with desk() as made:
        made.ask(Asked(**LONG)).wait()
        while not made.service._lines:
            time.sleep(0.001)
        noted = time.time()
        assert made.lines.empty()
    _, fields = made.lines.get(timeout=5)
    assert began - 0.001 <= fields["time"] <= noted + 0.001  # milliseconds


def test_a_response_has_the_tensors_that_are_declared() -> None:
    arrays = as_arrays(ping_response())
    assert list(arrays) == [tensor.name for tensor in wire.OUTPUTS]
    assert {name: array.shape for name, array in arrays.items()} == {
        tensor.name: (1, 1 if tensor.size == wire.ONE else 0) for tensor in wire.OUTPUTS
    }
    assert arrays["text_output"].tolist() == [[b"alive"]]

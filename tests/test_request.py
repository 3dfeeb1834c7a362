"""Canvas and request states: how a canvas is renoised and ends, where an answer is cut, what is encoded next."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from canvasrt.diffusion.canvas import CanvasState
from canvasrt.diffusion.noise import step_noise
from canvasrt.diffusion.params import RequestParams
from canvasrt.diffusion.request import RequestState

SIZE = 8
EOS, OTHER_EOS = 1, 2
PROMPT = np.arange(10, 15, dtype=np.int32)
PARAMS = RequestParams(
    seed=3,
    max_tokens=1000,
    max_denoising_steps=10,
    t_min=0.4,
    t_max=0.8,
    entropy_bound=0.1,
    stability_threshold=1,
    confidence_threshold=0.005,
    top_k=0,
    top_p=1.0,
    stop=(),
    stop_token_ids=frozenset({EOS, OTHER_EOS}),
    canvas=SIZE,
    vocabulary=100,
)


def canvas(*tokens: int) -> np.ndarray:
    """These tokens, then 50, 51, ... up to the canvas's length."""
    return np.array([*tokens, *range(50, 50 + SIZE - len(tokens))], np.int32)


def entropies(value: float) -> np.ndarray:
    return np.full(SIZE, value, np.float32)


def started(**changes: Any) -> RequestState:
    return RequestState.new(replace(PARAMS, **changes), PROMPT).encoded(len(PROMPT))


def settled(state: RequestState, argmax: np.ndarray) -> RequestState:
    """After a whole canvas in the two steps that the stop rule needs."""
    sampled = np.zeros(SIZE, np.int32)
    return state.denoised(argmax, sampled, entropies(0)).denoised(argmax, sampled, entropies(0))


def test_a_new_request_encodes_its_prompt_before_the_first_noise_canvas() -> None:
    state = RequestState.new(PARAMS, PROMPT)
    assert state.to_encode.tolist() == PROMPT.tolist()
    assert (state.context, state.passes, state.output, state.finish_reason, state.draft) == (0, 0, (), None, None)
    assert state.canvas.tokens.tolist() == step_noise(3, 0, 11, SIZE, 100).tokens.tolist()
    assert (state.canvas.step, state.canvas.argmax, state.canvas.done) == (10, None, False)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=10))
def test_a_context_grows_by_what_was_encoded_in_pieces_of_any_size(pieces: list[int]) -> None:
    state = RequestState.new(PARAMS, np.arange(sum(pieces), dtype=np.int32))
    seen: list[int] = []
    for piece in pieces:
        assert state.context == len(seen)
        seen += state.to_encode[:piece].tolist()
        state = state.encoded(piece)
    assert seen == list(range(sum(pieces)))
    assert (state.context, len(state.to_encode)) == (sum(pieces), 0)


def test_accepted_positions_take_the_sampled_token_and_all_others_the_noise_of_this_step() -> None:
    sampled = np.arange(80, 80 + SIZE, dtype=np.int32)
    entropy = entropies(3)
    entropy[[2, 5]] = 0
    state = CanvasState.new(PARAMS, 4).advanced(PARAMS, canvas(), sampled, entropy)
    noise = step_noise(3, 4, 10, SIZE, 100).tokens
    # the lowest two, and the first of the others: the sum before it is still 0
    kept = [0, 2, 5]
    expected = noise.copy()
    expected[kept] = sampled[kept]
    assert state.tokens.tolist() == expected.tolist()
    assert np.flatnonzero(state.accepted).tolist() == kept
    assert state.argmax.tolist() == canvas().tolist()
    assert (state.index, state.step, state.done) == (4, 9, False)


def test_acceptance_has_no_memory() -> None:
    sampled = np.arange(80, 80 + SIZE, dtype=np.int32)
    confident_everywhere = CanvasState.new(PARAMS, 0).advanced(PARAMS, canvas(), sampled, entropies(0))
    assert confident_everywhere.accepted.all()
    entropy = entropies(3)
    entropy[6] = 2
    after = confident_everywhere.advanced(PARAMS, canvas(), sampled, entropy)
    assert np.flatnonzero(after.accepted).tolist() == [6]
    noise = step_noise(3, 0, 9, SIZE, 100).tokens.copy()
    noise[6] = 86
    assert after.tokens.tolist() == noise.tolist()


def test_steps_count_down_and_temperature_and_uniforms_belong_to_the_step_to_run_next() -> None:
    state = CanvasState.new(PARAMS, 2)
    for step in range(10, 0, -1):
        assert not state.done
        assert state.step == step
        assert state.temperature(PARAMS) == pytest.approx(0.4 + 0.4 * step / 10)
        assert state.uniforms(PARAMS).tolist() == step_noise(3, 2, step, SIZE, 100).uniforms.tolist()
        state = state.advanced(PARAMS, canvas(), canvas(), entropies(3))
    assert state.done
    assert state.step == 0


@pytest.mark.parametrize(("threshold", "passes"), [(0, 1), (1, 2), (2, 3), (3, 4), (9, 10), (50, 10)])
def test_a_canvas_that_never_changes_stops_after_threshold_plus_one_steps(threshold: int, passes: int) -> None:
    params = replace(PARAMS, stability_threshold=threshold)
    state, count = CanvasState.new(params, 0), 0
    while not state.done:
        state, count = state.advanced(params, canvas(), canvas(), entropies(0)), count + 1
        assert len(state.history) <= threshold  # what the stop rule looks at, and no more
    assert count == passes


def test_a_canvas_must_be_equal_in_a_row_however_often_it_came_before() -> None:
    params = replace(PARAMS, stability_threshold=2)
    state = CanvasState.new(params, 0)
    done = []
    for argmax in (canvas(9), canvas(9), canvas(8), canvas(9), canvas(9), canvas(9)):
        state = state.advanced(params, argmax, argmax, entropies(0))
        done.append(state.done)
    assert done == [False] * 5 + [True]


def test_a_canvas_stops_only_where_the_mean_entropy_is_below_the_threshold() -> None:
    params = replace(PARAMS, confidence_threshold=0.25)
    once = CanvasState.new(params, 0).advanced(params, canvas(), canvas(), entropies(0))
    assert not once.advanced(params, canvas(), canvas(), entropies(0.25)).done
    assert once.advanced(params, canvas(), canvas(), entropies(0.2499)).done
    one_uncertain = entropies(0)
    one_uncertain[3] = 1.9
    assert once.advanced(params, canvas(), canvas(), one_uncertain).done  # the mean counts, not the maximum


@pytest.mark.parametrize("token", [EOS, OTHER_EOS])
def test_an_end_of_sequence_token_cuts_the_canvas_and_ends_with_stop(token: int) -> None:
    state = settled(started(), canvas(30, 31, token, 33, EOS))
    assert (state.output, state.finish_reason) == ((30, 31), "stop")
    assert len(state.to_encode) == 0


def test_an_end_of_sequence_token_at_once_gives_an_empty_answer() -> None:
    state = settled(started(), canvas(EOS, 31))
    assert (state.output, state.finish_reason, state.passes) == ((), "stop", 2)


def test_a_stop_token_of_the_request_ends_it_and_without_any_a_canvas_is_taken_whole() -> None:
    argmax = canvas(30, EOS, 77)
    assert settled(started(stop_token_ids=frozenset({77})), argmax).output == (30, EOS)
    endless = settled(started(stop_token_ids=frozenset()), argmax)
    assert endless.output == tuple(argmax.tolist())
    assert endless.finish_reason is None


@pytest.mark.parametrize(
    ("end", "max_tokens", "kept", "reason"),
    [
        (None, 3, 3, "length"),
        (None, SIZE, SIZE, "length"),
        (2, 3, 2, "stop"),
        (3, 3, 3, "stop"),  # the end itself does not count against max_tokens
        (4, 3, 3, "length"),
        (SIZE - 1, SIZE - 1, SIZE - 1, "stop"),
        (0, 1, 0, "stop"),
        (1, 1, 1, "stop"),
        (2, 1, 1, "length"),
    ],
)
@pytest.mark.parametrize("earlier", [0, 2])
def test_max_tokens_cuts_inside_a_canvas(
    end: int | None, max_tokens: int, kept: int, reason: str, earlier: int
) -> None:
    state = started(max_tokens=earlier * SIZE + max_tokens)
    for _ in range(earlier):
        state = settled(state, canvas())
        assert state.finish_reason is None
        state = state.encoded(SIZE)
    argmax = canvas(*range(30, 38))
    if end is not None:
        argmax[end] = EOS
    state = settled(state, argmax)
    assert state.output == tuple(canvas().tolist()) * earlier + tuple(argmax[:kept].tolist())
    assert state.finish_reason == reason
    assert len(state.to_encode) == 0
    assert state.passes == 2 * (earlier + 1)


def test_a_canvas_that_is_not_the_last_is_encoded_whole_and_as_its_argmax() -> None:
    state = started()
    first = canvas(30, 31)
    state = settled(state, first)
    assert state.to_encode.tolist() == first.tolist()
    assert state.output == tuple(first.tolist())
    assert state.context == len(PROMPT)
    assert (state.canvas.index, state.canvas.step, state.canvas.history) == (1, 10, ())
    assert state.canvas.tokens.tolist() == step_noise(3, 1, 11, SIZE, 100).tokens.tolist()
    assert state.draft.argmax.tolist() == first.tolist()  # what was just denoised, for display
    state = state.encoded(SIZE)
    assert (state.context, len(state.to_encode)) == (len(PROMPT) + SIZE, 0)


def test_the_answer_is_the_last_argmax_canvas_when_the_steps_run_out() -> None:
    state = started(max_denoising_steps=3, max_tokens=SIZE)
    for number in (20, 21, 22):
        assert state.finish_reason is None
        state = state.denoised(canvas(number), canvas(99), entropies(3))
    assert state.output == tuple(canvas(22).tolist())
    assert (state.passes, state.finish_reason) == (3, "length")


def test_states_are_values_and_an_earlier_one_can_be_resumed() -> None:
    state = started()
    before = state.canvas.tokens.copy()
    once, again = (state.denoised(canvas(), canvas(9), entropies(2)) for _ in range(2))
    assert once.canvas.tokens.tolist() == again.canvas.tokens.tolist()
    assert state.canvas.tokens.tolist() == before.tolist()
    assert (state.passes, once.passes) == (0, 1)


def test_a_request_stopped_from_outside_keeps_its_output() -> None:
    state = settled(started(), canvas()).stopped()
    assert (state.output, state.finish_reason) == (tuple(canvas().tolist()), "stop")

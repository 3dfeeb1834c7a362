"""Loads for the scheduler's tests: random ones, and those that work against each promise of fairness."""

from collections.abc import Callable
from dataclasses import replace
from itertools import count
from typing import Any

import numpy as np

from canvasrt.diffusion.request import RequestState
from canvasrt.scheduler.types import Policy, Request, StopCheck
from scheduling import CANVAS, CONTEXT, POLICY, VOCABULARY, Session, ask, fake, published, short, steady


def stop_after(canvases: int) -> StopCheck:
    def check(state: RequestState) -> bool:
        return len(state.output) >= canvases * CANVAS

    return check


def random_policy(rng: np.random.Generator, **fixed: Any) -> Policy:
    policy = Policy(
        canvases=int(rng.integers(1, 5)),
        prefill_tokens=int(rng.choice([1, 3, 8, 20, 1000])),
        max_waiting=1000,
        patience=int(rng.integers(0, 7)),
        reuse_prefixes=bool(rng.integers(0, 2)),
    )
    return replace(policy, **fixed)


def random_requests(rng: np.random.Generator, many: int, conversations: float = 0.7) -> list[Request]:
    """Ragged ones; some go on where an earlier one ended, or share only its beginning."""
    requests: list[Request] = []
    contexts: list[tuple[int, ...]] = []
    seeds = rng.permutation(10 * many)
    for number in range(many):
        prompt = rng.integers(2, VOCABULARY, rng.integers(1, 40))
        if contexts and rng.random() < conversations:
            earlier = contexts[rng.integers(len(contexts))]
            common = len(earlier) if rng.random() < 0.6 else int(rng.integers(1, len(earlier) + 1))
            prompt = np.concatenate([earlier[:common], prompt[: rng.integers(0, 9)]])
        request = ask(
            number,
            prompt[: CONTEXT - 4 * CANVAS].astype(np.int32),
            seed=int(seeds[number]),
            max_tokens=int(rng.integers(1, 4 * CANVAS)),
            max_denoising_steps=int(rng.integers(1, 8)),
            entropy_bound=float(rng.choice([0.05, 0.5, 3.0])),
            stability_threshold=int(rng.integers(0, 3)),
            confidence_threshold=float(rng.choice([1e-9, 0.005, 0.5])),
            stop_token_ids=frozenset({1} if rng.random() < 0.6 else ()),
            top_k=int(rng.choice([0, 3])),
            top_p=float(rng.choice([1.0, 0.8])),
            priority=int(rng.integers(1, 5)),
            draft_every=int(rng.integers(0, 4)),
            stop_check=stop_after(int(rng.integers(1, 4))) if rng.random() < 0.3 else None,
        )
        requests.append(request)
        contexts.append(published(request, fake(1)).context)
    return requests


def random_session(seed: int, mishaps: bool = False, **policy: Any) -> Session:
    """Requests that come between ticks, run to the end; ``mishaps``: deadlines, cancellations, failing calls."""
    rng = np.random.default_rng(seed)
    window = int(rng.choice([1 << 30, 12, 0]))
    session = Session(random_policy(rng, **policy), fake(int(rng.integers(1, 6)), window=window))
    requests = random_requests(rng, int(rng.integers(3, 15)))
    arrivals = sorted(rng.integers(0, 40, len(requests)).tolist())
    cancels: dict[int, list[int]] = {}
    if mishaps:
        late = {number: float(rng.integers(-2, 30)) for number in range(len(requests)) if rng.random() < 0.2}
        requests = [
            replace(request, deadline=arrivals[request.id] + late[request.id]) if request.id in late else request
            for request in requests
        ]
        for number, arrival in enumerate(arrivals):
            if rng.random() < 0.3:
                cancels.setdefault(arrival + int(rng.integers(0, 25)), []).append(number)
        session.runner.fail_calls = {int(rng.integers(1, 60)): bool(rng.integers(0, 2)) for _ in range(2)}

    def happen(tick: int) -> None:
        session.submit(*(request for request, arrival in zip(requests, arrivals, strict=True) if arrival == tick))
        for number in cancels.get(tick, []):
            session.cancel(number)

    happen(0)
    for tick in range(1, 70):
        if mishaps and rng.random() < 0.1 and session.runner.fail_slot is None:
            session.runner.fail_slot = (session.runner.calls + 1, int(rng.integers(session.runner.limits.slots)))
        if rng.random() < 0.5:
            happen(tick)
            session.tick()
        else:
            session.tick(between=lambda tick=tick: happen(tick))
    session.runner.fail_slot = None
    return session.finish()


def mishap_session(seed: int) -> Session:
    return random_session(seed, mishaps=True)


def stream(session: Session, ticks: int, make: Callable[[int], Request], each_tick: int = 1, first: int = 100) -> None:
    """New requests in every tick, whatever happens."""
    numbers = count(first)
    for _ in range(ticks):
        session.submit(*(make(next(numbers)) for _ in range(each_tick)))
        session.tick()


def urgent_arrivals(patience: int = 5, slots: int = 2) -> Session:
    """Two patient requests behind a stream of more urgent ones than the slots can take."""
    session = Session(replace(POLICY, patience=patience), fake(slots))
    session.submit(*(short(number, priority=1) for number in range(slots)))
    session.submit(short(50, priority=3), short(51, priority=4))
    stream(session, 40, lambda number: short(number, priority=1), each_tick=slots)
    return session.finish()


def more_canvases_than_rows(slots: int, canvases: int, steps: tuple[int, ...] = (1, 2, 5)) -> Session:
    """Every slot has a ready canvas nearly always; short requests come and go between long ones."""
    session = Session(replace(POLICY, canvases=canvases, prefill_tokens=1000), fake(slots))
    session.submit(*(steady(number, 3, canvases=3) for number in range(slots - 1)))
    stream(session, 40, lambda number: steady(number, 3, canvases=1, steps=steps[number % len(steps)]))
    return session.finish()


def prompts_beside_a_long_one(slots: int, piece: int, prompt: int, prefill: int = 10) -> Session:
    """One prompt of 100 tokens, and in every tick another of ``prompt`` tokens that leaves ``piece`` of the room."""
    session = Session(replace(POLICY, canvases=slots, prefill_tokens=prefill, reuse_prefixes=False), fake(slots))
    for number in range(slots - 2):
        session.submit(short(number, prompt))
        session.tick()
    session.submit(short(50, 100))
    stream(session, 60, lambda number: short(number, prefill - piece))
    return session.finish()


def long_prompt_beside_canvases() -> Session:
    """Canvases that run all the time, and in the middle a prompt ten times as long as theirs."""
    session = Session(replace(POLICY, canvases=3, prefill_tokens=8), fake(4))
    session.submit(*(steady(number, 8, canvases=4, steps=4) for number in range(3)))
    session.ticks(4)
    session.submit(steady(50, 80, canvases=1))
    return session.finish()

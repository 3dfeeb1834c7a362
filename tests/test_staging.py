"""Inputs on their way to the GPU: what is sent, when, and that a caller who does not wait loses none of it."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from canvasrt.runtime.cuda_device import CudaDevice
from canvasrt.runtime.engine_call import Arrays
from canvasrt.runtime.staging import ALIGNMENT, Staging, aligned_bytes
from host_gpu import HostDriver

TYPES = (np.int32, np.float32, np.bool_)
RANGES = {"encoder": 4096, "decoder": 8192}


class Sender:
    """Staging whose calls are seen by an engine that runs when the GPU comes to it."""

    def __init__(self) -> None:
        self.driver = HostDriver()
        self.device = CudaDevice(self.driver)
        self.staging = Staging(self.device, RANGES)
        self.asked = 0
        self.seen: list[Arrays] = []

    def send(self, shape_range: str, key: object, constants: Arrays, step: Arrays) -> dict[str, int]:
        def ask() -> Arrays:
            self.asked += 1
            return constants

        addresses = self.staging.send(shape_range, key, ask, step)
        shapes = {name: (array.dtype, array.shape) for name, array in (constants | step).items()}
        self.driver.enqueue(lambda: self.seen.append(self.read(addresses, shapes)))
        return addresses

    def read(self, addresses: dict[str, int], shapes: dict[str, Any]) -> Arrays:
        assert addresses.keys() == shapes.keys()
        found = {}
        for name, (kind, shape) in shapes.items():
            nbytes = int(np.prod(shape)) * kind.itemsize
            whole = self.driver.view(addresses[name], nbytes) if nbytes else np.zeros(0, np.uint8)
            found[name] = whole.view(kind).reshape(shape).copy()
        return found


@pytest.fixture
def sender() -> Sender:
    return Sender()


def content(seed: int, *sizes: int, prefix: str = "") -> Arrays:
    """One array for each size, of different types."""
    rng = np.random.default_rng(seed)
    arrays = [rng.integers(0, 1000, size).astype(TYPES[index % 3]) for index, size in enumerate(sizes)]
    return {f"{prefix}{index}": array for index, array in enumerate(arrays)}


def assert_equal(found: Arrays, expected: Arrays) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def test_constants_are_sent_once_and_step_inputs_every_time(sender: Sender) -> None:
    constants = content(0, 30, 5, 300)
    steps = [content(seed, 70, 2, prefix="step") for seed in range(1, 6)]
    for step in steps:
        sender.send("decoder", "key", constants, step)
    sender.device.synchronize()
    assert sender.asked == 1
    for found, step in zip(sender.seen, steps, strict=True):
        assert_equal(found, constants | step)
    sent = 256 + 256 + 512  # 120, 20 and 300 bytes
    assert sender.staging.uploaded == sender.driver.moved["to the GPU"] == sent + 5 * (512 + 256)
    assert sender.driver.calls["cuMemcpyHtoDAsync"] == 1 + 5


def test_another_key_brings_other_constants_and_each_range_has_its_own(sender: Sender) -> None:
    expected = []
    for turn, (shape_range, key, asked) in enumerate(
        [("decoder", 1, 1), ("encoder", 1, 2), ("decoder", 1, 2), ("encoder", 1, 2), ("decoder", 2, 3),
         ("decoder", 1, 4), ("encoder", 1, 4), ("encoder", (1,), 5)]
    ):  # fmt: skip
        constants = content(10 * list(RANGES).index(shape_range) + (key if isinstance(key, int) else 9), 9, 40)
        step = content(2000 + turn, 33, prefix="step")
        sender.send(shape_range, key, constants, step)
        assert sender.asked == asked
        expected.append(constants | step)
    sender.device.synchronize()
    for found, arrays in zip(sender.seen, expected, strict=True):
        assert_equal(found, arrays)


SENT = st.tuples(
    st.sampled_from(sorted(RANGES)), st.integers(0, 2), st.lists(st.integers(0, 200), min_size=1, max_size=3)
)


@given(st.lists(SENT, min_size=1, max_size=12), st.data())
def test_every_call_has_its_own_content_however_late_it_runs(calls: list[Any], data: st.DataObject) -> None:
    """Only some callers wait; a block of this machine that is written too early would show in an earlier call."""
    sender, expected, bytes_sent = Sender(), [], 0
    last: dict[str, object] = {}
    for turn, (shape_range, key, sizes) in enumerate(calls):
        constants = content(key, 50 * key, 7, 64)
        step = content(100 + turn, *sizes, prefix="step")
        for array in step.values():
            array[:] = turn + 1
        sender.send(shape_range, key, constants, step)
        sent = list(step.values()) + (list(constants.values()) if last.get(shape_range) != key else [])
        bytes_sent += sum(-(-array.nbytes // 256) * 256 for array in sent)
        last[shape_range] = key
        expected.append({name: array.copy() for name, array in (constants | step).items()})
        for array in (*constants.values(), *step.values()):
            array[:] = 0  # the caller's arrays are its own again
        if data.draw(st.booleans()):
            sender.device.synchronize()
    sender.device.synchronize()
    assert sender.driver.reason == ""
    assert sender.staging.uploaded == bytes_sent
    for found, arrays in zip(sender.seen, expected, strict=True):
        assert_equal(found, arrays)


def test_the_third_call_waits_for_the_first_one_s_copies_and_no_longer(sender: Sender) -> None:
    for turn in range(2):
        sender.send("decoder", "key", content(0, 9), content(turn, 9, prefix="step"))
    assert sender.seen == []
    sender.send("decoder", "key", content(0, 9), content(2, 9, prefix="step"))
    assert sender.seen == []  # the call itself comes behind its copies
    sender.send("decoder", "key", content(0, 9), content(3, 9, prefix="step"))
    assert len(sender.seen) == 1


def test_every_array_begins_at_a_multiple_of_256_bytes_behind_the_one_before(sender: Sender) -> None:
    constants, step = content(0, 64, 1, 257), content(1, 65, 0, 3, prefix="step")
    addresses = sender.send("decoder", "key", constants, step)
    base = addresses["0"]
    assert ALIGNMENT == 256
    assert [addresses[name] - base for name in constants] == [0, 256, 512]
    base = addresses["step0"]
    assert [addresses[name] - base for name in step] == [0, 512, 512]
    assert all(address % 256 == 0 for address in addresses.values())
    assert [aligned_bytes(nbytes) for nbytes in (0, 1, 256, 257)] == [0, 256, 256, 512]


def test_addresses_are_the_same_for_the_same_sizes(sender: Sender) -> None:
    small, large = (9, 40), (90, 40)
    first = sender.send("decoder", "a", content(0, *small), content(1, *small, prefix="step"))
    for turn, key in enumerate("abba"):
        again = sender.send("decoder", key, content(turn, *small), content(turn, *small, prefix="step"))
        assert again == first
    assert sender.send("decoder", "c", content(0, *large), content(1, *large, prefix="step")) != first
    assert sender.send("encoder", "a", content(0, *small), content(1, *small, prefix="step")).keys() == first.keys()
    assert sender.send("decoder", "a", content(0, *small), content(1, *small, prefix="step")) == first


def test_ranges_do_not_share_memory(sender: Sender) -> None:
    taken: list[tuple[int, int]] = []
    for name in RANGES:
        constants, step = content(0, 9), content(1, 9, prefix="step")
        addresses = sender.send(name, "key", constants, step)
        taken += [(address, address + RANGES[name]) for address in addresses.values()]
    taken.sort()
    assert all(end <= start for (_, end), (start, _) in pairwise(taken))


def test_a_call_of_the_largest_sizes_fits(sender: Sender) -> None:
    """Constants and step inputs each as large as was said, in the larger of the ranges."""
    whole = RANGES["decoder"]
    constants: Arrays = {"c": np.arange(whole // 4, dtype=np.int32)}
    step: Arrays = {"s": np.arange(whole // 4, dtype=np.float32)}
    sender.send("decoder", "key", constants, step)
    sender.device.synchronize()
    assert_equal(sender.seen[0], constants | step)
    assert sender.staging.uploaded == 2 * whole


def test_arrays_of_any_layout_are_sent_as_they_read(sender: Sender) -> None:
    whole: NDArray[np.int32] = np.arange(48, dtype=np.int32).reshape(6, 8)
    constants: Arrays = {"transposed": whole.T, "repeated": np.broadcast_to(whole[:1], (3, 8))}
    step: Arrays = {"every second": whole[::2, 1], "one": np.ones((), np.float32)}
    sender.send("encoder", "key", constants, step)
    sender.device.synchronize()
    assert_equal(sender.seen[0], constants | step)


def test_nothing_is_allocated_per_call(sender: Sender) -> None:
    names = ("cuMemAlloc", "cuMemHostAlloc", "cuEventCreate")
    before = [sender.driver.calls[name] for name in names]
    assert before == [2 * len(RANGES), 2, 2]
    for turn in range(5):
        sender.send("decoder", turn, content(turn, 9), content(turn, 9, prefix="step"))
    assert [sender.driver.calls[name] for name in names] == before

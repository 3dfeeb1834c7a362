"""The slots' memory on a GPU that is this machine's, against NumPy arrays of the same shapes."""

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from canvasrt.runtime import kv_memory
from canvasrt.runtime.cuda_device import CudaDevice, OutOfMemoryError
from canvasrt.runtime.kv_memory import Buffer, Held, KvMemory
from host_gpu import HostDriver

PLACES = 4
BUFFERS = [
    Buffer("k.0", "sliding", 3, 11, 6),
    Buffer("v.0", "sliding", 2, 11, 10),
    Buffer("k.1", "full", 2, 16, 8),
    Buffer("v.1", "full", 1, 16, 4),
    Buffer("soft", "soft", 1, 5, 12),
]
ROWS = {"full": 16, "sliding": 11, "soft": 5}

Arrays = dict[str, NDArray[np.uint8]]  # by buffer, (places, heads, rows, row bytes)


class Memory:
    """KvMemory that holds random bytes, and the same bytes as arrays."""

    def __init__(self, seed: int = 0) -> None:
        self.driver = HostDriver()
        self.device = CudaDevice(self.driver)
        self.kv = KvMemory(self.device, BUFFERS, PLACES)
        self.device.synchronize()
        rng = np.random.default_rng(seed)
        self.arrays: Arrays = {}
        for buffer in BUFFERS:
            array = rng.integers(0, 256, (PLACES, buffer.heads, buffer.rows, buffer.row_bytes), np.uint8)
            self.whole(buffer)[:] = array
            self.arrays[buffer.name] = array

    def whole(self, buffer: Buffer) -> NDArray[np.uint8]:
        shape = (PLACES, buffer.heads, buffer.rows, buffer.row_bytes)
        return self.driver.view(self.kv.address(buffer.name, 0), int(np.prod(shape))).reshape(shape)

    def check(self, rows: int | None = None) -> None:
        """``rows`` of every head, all where None."""
        self.device.synchronize()
        for buffer in BUFFERS:
            ours = self.whole(buffer)[:, :, :rows]
            np.testing.assert_array_equal(ours, self.arrays[buffer.name][:, :, :rows], err_msg=buffer.name)
        assert self.driver.reason == ""


@pytest.fixture
def memory() -> Iterator[Memory]:
    made = Memory()
    yield made
    assert made.driver.reason == ""


def test_fresh_memory_reads_as_zeros_and_not_as_the_nan_that_was_there() -> None:
    driver = HostDriver()
    device = CudaDevice(driver)
    fresh = device.allocate(64)
    assert np.isnan(driver.view(fresh, 64).view(np.float32)).all()
    kv = KvMemory(device, BUFFERS, PLACES)
    for buffer in BUFFERS:
        for place in range(PLACES):
            found = kv.read(buffer.name, place, buffer.rows)
            assert found.shape == (buffer.heads, buffer.rows, buffer.row_bytes)
            assert not found.any()


def test_neighbouring_places_lie_one_behind_the_other(memory: Memory) -> None:
    for place in range(PLACES):
        addresses = memory.kv.addresses(place)
        assert list(addresses) == [buffer.name for buffer in BUFFERS]
        for buffer in BUFFERS:
            nbytes = buffer.heads * buffer.rows * buffer.row_bytes
            assert (buffer.place_bytes, buffer.head_bytes) == (nbytes, nbytes // buffer.heads)
            assert addresses[buffer.name] == memory.kv.address(buffer.name, place)
            assert addresses[buffer.name] == memory.kv.addresses(0)[buffer.name] + place * nbytes
    assert all(address % 256 == 0 for address in memory.kv.addresses(0).values())


def test_the_first_rows_of_every_head_are_read(memory: Memory) -> None:
    allocated = len(memory.driver._pinned)
    for buffer in BUFFERS:
        for rows in (0, 1, buffer.rows):
            found = memory.kv.read(buffer.name, 2, rows)
            np.testing.assert_array_equal(found, memory.arrays[buffer.name][2, :, :rows])
            assert found.flags.owndata  # the memory that it came through is given back
    memory.check()
    assert len(memory.driver._pinned) == allocated


def test_reading_comes_after_all_that_is_queued(memory: Memory) -> None:
    memory.kv.clear_soft(1)
    assert not memory.kv.read("soft", 1, 5).any()


@pytest.mark.parametrize("place", range(PLACES))
def test_clearing_takes_the_soft_embeddings_of_one_place(memory: Memory, place: int) -> None:
    memory.kv.clear_soft(place)
    memory.arrays["soft"][place] = 0
    memory.check()


@pytest.mark.parametrize("place", [0, PLACES - 1])
def test_rows_that_move_to_the_front_are_those_of_a_slice(place: int) -> None:
    """Also where source and target overlap, which one copy must not."""
    rows = ROWS["sliding"]
    for first in range(1, rows):
        for count in range(rows - first + 1):
            memory = Memory(first * rows + count)
            memory.kv.move_to_front(place, first, count)
            for name in ("k.0", "v.0"):
                array = memory.arrays[name][place]
                array[:, :count] = array[:, first : first + count].copy()
            memory.check()


def held(share: tuple[int, int, int]) -> Held:
    return Held(*(min(part, rows) for part, rows in zip(share, ROWS.values(), strict=True)))


SHARES = st.tuples(*(st.one_of(st.just(0), st.integers(0, rows)) for rows in ROWS.values()))


@pytest.mark.parametrize("piece", [kv_memory.EXCHANGE_BYTES, 64, 7, 1])
def test_an_exchange_is_a_swap_of_what_is_held(monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    """In one piece and in many, whose last is shorter. Other places keep every byte."""
    monkeypatch.setattr(kv_memory, "EXCHANGE_BYTES", piece)

    @given(SHARES, SHARES, st.permutations(range(PLACES)))
    def check(one: tuple[int, int, int], other: tuple[int, int, int], places: list[int]) -> None:
        a, b, *others = places
        memory = Memory()
        memory.kv.exchange(a, b, held(one), held(other))
        memory.device.synchronize()
        assert memory.driver.reason == ""
        for buffer in BUFFERS:
            ours, before = memory.whole(buffer), memory.arrays[buffer.name]
            rows_a, rows_b = held(one).of(buffer.kind), held(other).of(buffer.kind)
            np.testing.assert_array_equal(ours[b, :, :rows_a], before[a, :, :rows_a])
            np.testing.assert_array_equal(ours[a, :, :rows_b], before[b, :, :rows_b])
            np.testing.assert_array_equal(ours[others], before[others])

    check()


def test_an_exchange_with_a_place_that_holds_nothing_copies_one_way(memory: Memory) -> None:
    full, nothing = Held(9, 5, 5), Held(0, 0, 0)
    memory.kv.exchange(1, 3, nothing, nothing)
    assert memory.driver.waiting == 0
    memory.check()
    memory.kv.exchange(1, 3, full, nothing)
    assert memory.driver.calls["cuMemcpy2DAsync"] == len(BUFFERS)
    memory.kv.exchange(0, 2, nothing, full)
    assert memory.driver.calls["cuMemcpy2DAsync"] == 2 * len(BUFFERS)
    assert memory.driver.calls["cuMemcpyDtoDAsync"] == 0
    for buffer in BUFFERS:
        rows = full.of(buffer.kind)
        array = memory.arrays[buffer.name]
        array[3, :, :rows] = array[1, :, :rows]
        array[0, :, :rows] = array[2, :, :rows]
    memory.check()


def test_places_that_hold_little_are_exchanged_head_by_head_and_no_further(memory: Memory) -> None:
    memory.kv.exchange(0, 3, Held(3, 2, 1), Held(1, 4, 2))
    for buffer in BUFFERS:
        rows = {"full": 3, "sliding": 4, "soft": 2}[buffer.kind]
        array = memory.arrays[buffer.name]
        array[[0, 3], :, :rows] = array[[3, 0], :, :rows]
    memory.check()


def test_memory_is_that_of_the_places_and_one_block_to_exchange_through() -> None:
    buffers = sum(buffer.place_bytes for buffer in BUFFERS)
    for places in (1, 2):
        driver = HostDriver()
        KvMemory(CudaDevice(driver), BUFFERS, places)
        assert driver.used == places * buffers + kv_memory.EXCHANGE_BYTES


def test_a_gpu_that_is_too_small_says_how_much_was_asked_for() -> None:
    most = BUFFERS[0].place_bytes * PLACES
    with pytest.raises(OutOfMemoryError, match=f"^{BUFFERS[1].place_bytes * PLACES:,} bytes$"):
        KvMemory(CudaDevice(HostDriver(memory=most)), BUFFERS, PLACES)

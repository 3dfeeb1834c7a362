"""What a build is put together from: the file that weights lie in while they are compiled, the build plan, choices."""

import contextlib
import os
import shlex
import subprocess
import sys
import weakref
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from canvasrt.bundle.manifest import command_text
from canvasrt.cli import build as command
from canvasrt.compile.buildplan import BuildPlan
from canvasrt.compile.choices import SETTINGS, chosen_setting, chosen_source, experts_text
from canvasrt.compile.scratch import Scratch
from canvasrt.compile.vram import Setting
from canvasrt.errors import CapacityError, InputError
from canvasrt.profiles.profile import Moe
from planning import CAPACITY, DEMO, PUBLISHED, profile, published

LARGE = 1 << 17


def numbers(size: int = LARGE, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8)


def place(array: np.ndarray) -> int:
    address: int = array.ctypes.data
    return address


@pytest.fixture
def mapped(tmp_path: Path) -> np.ndarray:
    (tmp_path / "mapped").write_bytes(numbers().tobytes())
    return np.memmap(tmp_path / "mapped", np.uint8, mode="r")


@given(sizes=st.lists(st.integers((1 << 16) + 1, 1 << 18), min_size=1, max_size=8))
def test_what_is_kept_is_equal_aligned_and_not_mixed_up(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int]
) -> None:
    with Scratch(tmp_path_factory.mktemp("scratch")) as scratch:
        given_ = [numbers(size, seed) for seed, size in enumerate(sizes)]
        kept = [scratch.kept(array) for array in given_]
        for array, view in zip(given_, kept, strict=True):
            assert np.array_equal(view, array)
            assert place(view) % 64 == 0
            assert type(view) is np.ndarray
            assert not view.flags.writeable


def handles_below(folder: Path) -> int:
    """Open files of this process that lie there, also without a name."""
    found = 0
    for handle in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found += str(folder) in os.readlink(f"/proc/self/fd/{handle}")
    return found


def test_what_is_kept_lies_in_a_file_without_a_name_and_outlives_the_context(tmp_path: Path) -> None:
    with Scratch(tmp_path) as scratch:
        view = scratch.kept(numbers())
        assert list(tmp_path.iterdir()) == []
        assert handles_below(tmp_path) >= 1
    assert np.array_equal(view, numbers())
    del view
    assert handles_below(tmp_path) == 0


def test_the_memory_that_was_given_is_let_go(tmp_path: Path) -> None:
    with Scratch(tmp_path) as scratch:
        array = numbers()
        gone = weakref.ref(array)
        view = scratch.kept(array)
        del array
        assert gone() is None
        assert view[5] == numbers()[5]


def test_small_data_stays_where_it_is_unless_it_is_not_aligned(tmp_path: Path) -> None:
    with Scratch(tmp_path) as scratch:
        whole = numbers(1 << 16)
        start = -place(whole) % 16
        aligned, odd = whole[start : start + 1000], whole[start + 3 : start + 1003]
        assert scratch.kept(aligned) is aligned
        copy = scratch.kept(odd)
        assert place(copy) % 16 == 0
        assert np.array_equal(copy, odd)


def test_data_of_a_mapped_file_is_not_copied_unless_it_is_not_aligned(tmp_path: Path, mapped: np.ndarray) -> None:
    with Scratch(tmp_path) as scratch:
        part = np.asarray(mapped[16:])[: LARGE - 64]
        assert scratch.kept(part) is part
        reshaped = np.asarray(mapped).view(np.uint16).reshape(256, -1).view(np.uint8).reshape(-1)
        assert scratch.kept(reshaped) is reshaped
        odd = np.asarray(mapped[3:])
        kept = scratch.kept(odd)
        assert kept is not odd
        assert place(kept) % 64 == 0
        assert np.array_equal(kept, odd)


def test_data_in_pieces_is_put_together(tmp_path: Path) -> None:
    whole = numbers(4 * LARGE).reshape(-1, 1024)
    with Scratch(tmp_path) as scratch:
        assert np.array_equal(scratch.kept(whole[:, ::2]), whole[:, ::2].reshape(-1))


def test_more_than_one_write_takes_is_kept_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda handle, data, offset: original(handle, data[:1000], offset))
    with Scratch(tmp_path) as scratch:
        assert np.array_equal(scratch.kept(numbers()), numbers())
        assert np.array_equal(scratch.kept(numbers(seed=1)), numbers(seed=1))


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with Scratch(tmp_path) as scratch:
        before = scratch.kept(numbers())
        monkeypatch.setattr(os, "pwrite", no_space)
        with pytest.raises(CapacityError) as caught:
            scratch.kept(numbers(seed=1))
        said = str(caught.value)
        assert f"can't write {tmp_path}: the disk is full" in said
        assert "at least 131,072 bytes more are needed" in said
        assert np.array_equal(before, numbers())


def test_memory_stays_small_however_much_is_kept(tmp_path: Path) -> None:
    """1 GB kept in 64 pieces by a process that may hold 600 MB of memory of its own."""
    code = """
import resource, sys
import numpy as np
from pathlib import Path
from canvasrt.compile.scratch import Scratch
resource.setrlimit(resource.RLIMIT_DATA, (600 << 20, 600 << 20))
with Scratch(Path(sys.argv[1])) as scratch:
    kept = [scratch.kept(np.full(16 << 20, seed, np.uint8)) for seed in range(64)]
assert [int(view[-1]) for view in kept] == list(range(64))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr


MOES = [None, Moe(formulation="dense"), Moe(formulation="capacity", encoder_capacity=5, decoder_capacity=7)]
PLANS = st.builds(
    BuildPlan,
    checkpoint=st.sampled_from(["models/a", "a b", "it's", "$HOME"]),
    profile=st.sampled_from(["h100", "my gpu.yaml"]),
    out=st.sampled_from(["engines/a", "a;b"]),
    weights=st.sampled_from(["inside", "stripped"]),
    recipe=st.sampled_from([None, "fp8", "a recipe.yaml"]),
    context=st.none() | st.integers(1, 262_144),
    slots=st.none() | st.integers(1, 256),
    canvases=st.none() | st.integers(1, 64),
    chunk=st.none() | st.integers(1, 262_144),
    moe=st.sampled_from(MOES),
)


@given(plan=PLANS)
def test_the_command_of_a_build_plan_says_all_of_it(plan: BuildPlan) -> None:
    """Whatever is printed for another machine, or kept in a manifest, builds the same there."""
    text = command_text(plan.checkpoint, plan.profile, plan.out, {"weights": plan.weights, **plan.options()})
    words = shlex.split(text)
    assert words[:2] == ["canvasrt", "build"]
    options = {name.removeprefix("--"): value for name, value in zip(words[2::2], words[3::2], strict=True)}
    given_: dict[str, object] = {
        name: int(value) if name in SETTINGS else value for name, value in options.items() if name != "moe"
    }
    if "moe" in options:
        given_["moe"] = command._moe(options["moe"])
    assert command._plan(None, given_) == plan


def choices_of(**asked: int) -> tuple[Setting, dict[str, str]]:
    setting, reasons = chosen_setting(profile(), published(), dict.fromkeys(SETTINGS) | asked)
    return setting, {reason.what: reason.reason for reason in reasons}


def test_what_nobody_asked_for_is_the_profiles_choice() -> None:
    setting, reasons = choices_of()
    assert asdict(setting) == {"slots": 4, "context": 32_768, "chunk": 512, "canvases": 2}
    assert {reasons[name] for name in SETTINGS} == {f"a reason for {name}" for name in SETTINGS}
    assert list(reasons) == [*SETTINGS, "K/V", "experts", "compiler"]


@pytest.mark.parametrize(
    ("asked", "found", "reasons"),
    [
        ({"slots": 1}, {"slots": 1, "canvases": 1}, {"canvases": "one for every slot; the profile says 2"}),
        ({"canvases": 9}, {"slots": 9, "canvases": 9}, {"slots": "one for every canvas; the profile says 4"}),
        ({"context": 600}, {"context": 600, "chunk": 512}, {"context": "--context", "chunk": "a reason for chunk"}),
        ({"chunk": 5000, "context": 4000}, {"chunk": 4000}, {"chunk": "the whole context; --chunk says 5,000"}),
        ({"context": 300}, {"context": 300, "chunk": 300}, {"chunk": "the whole context; the profile says 512"}),
    ],
)  # fmt: skip
def test_numbers_that_belong_together_follow_what_was_asked(
    asked: dict[str, int], found: dict[str, int], reasons: dict[str, str]
) -> None:
    setting, said = choices_of(**asked)
    assert found.items() <= asdict(setting).items()
    assert reasons.items() <= said.items()


def test_experts_in_words() -> None:
    assert experts_text(Moe(formulation="dense")) == "dense"
    capacity = Moe(**CAPACITY)
    assert experts_text(capacity) == "capacity: 128 tokens per expert to encode, 64 to denoise"


def test_a_configuration_alone_takes_the_profiles_recipe_or_the_one_that_was_asked_for() -> None:
    source, why = chosen_source(PUBLISHED, profile(), None)
    assert (source.quantization, why) == ("recipe nvfp4-experts", "a reason for recipe")
    source, why = chosen_source(PUBLISHED, profile(), "fp8")
    assert (source.quantization, why) == ("recipe fp8", "--recipe")
    source, why = chosen_source(PUBLISHED, profile(recipe="none"), None)
    assert (source.quantization, source.checkpoint) == ("none", None)
    with pytest.raises(InputError, match="no recipe is called 'fp9'"):
        chosen_source(PUBLISHED, profile(), "fp9")


def test_a_checkpoint_is_taken_as_it_is_stored() -> None:
    source, why = chosen_source(DEMO, profile(), None)
    assert (source.quantization, why) == ("none", "as the checkpoint is stored")
    assert source.checkpoint is not None

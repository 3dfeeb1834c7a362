"""A fingerprint tells checkpoints apart by what matters, and reads little of them."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from canvasrt.errors import CheckpointError
from canvasrt.fingerprint import Fingerprint, fingerprint

ROWS, WIDTH = 2048, 512  # 4 MiB in float32


def some_tensors() -> dict[str, np.ndarray]:
    """Two large ones with small ones between them, in the order in which they lie in the file."""
    numbers = np.random.default_rng(0)
    shapes = {"a.experts": (ROWS - 450, WIDTH), "b.norm": (WIDTH,), "c.scalar": (1,), "d.experts": (ROWS, WIDTH)}
    return {name: numbers.random(shape, np.float32) for name, shape in shapes.items()}


def write(folder: Path, tensors: dict[str, np.ndarray] | None = None, shards: int = 1) -> Path:
    folder.mkdir(parents=True)
    tensors = tensors or some_tensors()
    (folder / "config.json").write_text('{"model_type": "diffusion_gemma", "hidden_size": 512}')
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    shard_of = {name: f"model-{index % shards}.safetensors" for index, name in enumerate(tensors)}
    for shard in set(shard_of.values()):
        save_file({name: tensors[name] for name in tensors if shard_of[name] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shard_of}))
    return folder


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write(tmp_path / "checkpoint")


def patch(folder: Path, place: int, content: bytes) -> None:
    with (folder / "model.safetensors").open("r+b") as stream:
        stream.seek(place)
        stream.write(content)


def test_a_copy_a_link_and_other_files_make_no_difference(tmp_path: Path, checkpoint: Path) -> None:
    expected = fingerprint(checkpoint)
    shutil.copytree(checkpoint, tmp_path / "copy")
    (tmp_path / "copy" / "README.md").write_text("new")
    (tmp_path / "copy" / "tokenizer.json").write_text("{}")
    assert fingerprint(tmp_path / "copy") == expected
    linked = tmp_path / "snapshot"
    linked.mkdir()
    for file in checkpoint.iterdir():
        (linked / file.name).symlink_to(file)
    assert fingerprint(linked) == expected
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(dict(reversed(config.items())), indent=4))
    os.utime(checkpoint / "model.safetensors", (0, 0))
    assert fingerprint(checkpoint) == expected
    assert len(expected.layout) == len(expected.content or "") == 64


def change_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "diffusion_gemma", "hidden_size": 513}')


def declare_quantization(folder: Path) -> None:
    (folder / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "NVFP4"}}')


def edit_header(old: bytes, new: bytes) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        file = folder / "model.safetensors"
        content = file.read_bytes()
        assert content.count(old) == 1
        file.write_bytes(content.replace(old, new))

    return edit


@pytest.mark.parametrize(
    "change",
    [
        change_config,
        declare_quantization,
        edit_header(b'"b.norm"', b'"b.nose"'),
        edit_header(b'"F32","shape":[512]', b'"I32","shape":[512]'),
    ],
)
def test_another_model_has_another_layout(checkpoint: Path, change: Callable[[Path], None]) -> None:
    before = fingerprint(checkpoint)
    change(checkpoint)
    assert fingerprint(checkpoint).layout != before.layout


def test_another_sharding_has_another_layout(tmp_path: Path) -> None:
    prints = [fingerprint(write(tmp_path / str(shards), shards=shards)) for shards in (1, 2, 3)]
    assert len({each.layout for each in prints}) == 3


def test_tensors_that_lie_in_each_others_place_have_another_layout(tmp_path: Path) -> None:
    folder = write(tmp_path / "two", {"a": np.zeros(64, np.float32), "b": np.ones(64, np.float32)})
    before = fingerprint(folder)
    for old, new in ((b'"a"', b'"x"'), (b'"b"', b'"a"'), (b'"x"', b'"b"')):
        edit_header(old, new)(folder)
    assert fingerprint(folder).layout != before.layout


def test_another_shape_of_the_same_bytes_has_another_layout(tmp_path: Path) -> None:
    numbers = np.arange(64, dtype=np.float32)
    prints = [
        fingerprint(write(tmp_path / str(index), {"a": numbers.reshape(shape)}))
        for index, shape in enumerate([(64,), (8, 8), (4, 16)])
    ]
    assert len({each.layout for each in prints}) == 3


def test_another_fine_tune_has_other_contents_and_the_same_layout(tmp_path: Path, checkpoint: Path) -> None:
    before = fingerprint(checkpoint)
    size = (checkpoint / "model.safetensors").stat().st_size
    tuned = {
        "one value in every row": [(size - 4 * ROWS * WIDTH + row * WIDTH * 4, b"\1\2\3") for row in range(ROWS)],
        "a fiftieth at one place": [(size // 7, os.urandom(size // 50))],
        "the last byte": [(size - 1, b"\7")],
    }
    for name, changes in tuned.items():
        folder = tmp_path / name
        shutil.copytree(checkpoint, folder)
        for place, content in changes:
            patch(folder, place, content)
        after = fingerprint(folder)
        assert after.layout == before.layout, name
        assert after.content != before.content, name


@pytest.mark.parametrize("name", ["a.experts", "b.norm", "c.scalar", "d.experts"])
def test_a_fine_tune_of_a_single_tensor_is_seen(tmp_path: Path, checkpoint: Path, name: str) -> None:
    tensors = some_tensors()
    tensors[name] = tensors[name] * np.float32(1.01)
    tuned = fingerprint(write(tmp_path / "tuned", tensors))
    assert tuned.layout == fingerprint(checkpoint).layout
    assert tuned.content != fingerprint(checkpoint).content


def test_a_configuration_alone_has_a_layout_and_no_contents(checkpoint: Path) -> None:
    alone = fingerprint(checkpoint, weights=False)
    (checkpoint / "model.safetensors").unlink()
    assert fingerprint(checkpoint, weights=False) == alone == Fingerprint(alone.layout, None)
    with pytest.raises(CheckpointError, match="no weights"):
        fingerprint(checkpoint)


def test_little_is_read(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = 0
    original = os.pread

    def pread(handle: int, nbytes: int, offset: int) -> bytes:
        nonlocal read
        read += nbytes
        return original(handle, nbytes, offset)

    monkeypatch.setattr(os, "pread", pread)
    fingerprint(checkpoint)
    assert 300_000 < read < 500_000  # of 8 MB, and of 5 GB


def test_tiny_and_empty_files_have_a_fingerprint(tmp_path: Path) -> None:
    tiny = fingerprint(write(tmp_path / "tiny", {"a": np.zeros(1, np.float32)}))
    assert tiny.content != fingerprint(write(tmp_path / "other", {"a": np.ones(1, np.float32)})).content
    assert fingerprint(write(tmp_path / "empty", {"a": np.zeros((0, 4), np.float32)})).content


def test_what_can_not_be_read_is_named(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json: not readable as JSON"):
        fingerprint(checkpoint)
    (checkpoint / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config.json: not readable as JSON .*No such file"):
        fingerprint(checkpoint, weights=False)


def test_a_file_that_shrinks_while_it_is_read_is_told(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pread", lambda handle, nbytes, offset: b"")
    with pytest.raises(CheckpointError, match=r"model.safetensors: cut off while it was read"):
        fingerprint(checkpoint)

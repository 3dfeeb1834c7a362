"""Checkpoint against the safetensors library, and the refusal of every kind of broken folder."""

import json
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion

from canvasrt.checkpoint import Checkpoint
from canvasrt.errors import CheckpointError
from canvasrt.spec import ModelSpec

CONFIG: dict[str, Any] = {
    "model_type": "diffusion_gemma",
    "image_token_id": 20,
    "canvas_length": 8,
    "text_config": {
        "vocab_size": 24,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "global_head_dim": 16,
        "max_position_embeddings": 64,
        "sliding_window": 16,
        "num_experts": 2,
        "top_k_experts": 1,
        "moe_intermediate_size": 4,
    },
    "vision_config": {
        "model_type": "gemma4_vision",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "position_embedding_size": 8,
    },
}
SPEC = ModelSpec.from_config(CONFIG, "CONFIG")
NORM = "model.decoder.norm.weight"
EMBEDDING = "model.decoder.embed_tokens.weight"
VISION = "model.encoder.vision_tower.patch_embedder.input_proj.weight"
EXPERTS = "model.decoder.layers.0.experts.gate_up_proj"

Tensors = dict[str, torch.Tensor]


def random_tensors(dtype: torch.dtype = torch.bfloat16) -> Tensors:
    generator = torch.Generator().manual_seed(1)
    shapes = SPEC.tensors() | {VISION: (3, 5), "model.encoder.embed_vision.embedding_projection.weight": (16, 3)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def write_config(folder: Path, **outer: Any) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | outer))


def write_single(folder: Path, tensors: Tensors) -> Path:
    write_config(folder)
    file = folder / "model.safetensors"
    save_file(tensors, file, metadata={"format": "pt"})
    return file


def write_index(folder: Path, shard_of: dict[str, Any]) -> None:
    content = {"metadata": {}, "weight_map": shard_of}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


def write_shards(folder: Path, tensors: Tensors) -> dict[str, Any]:
    write_config(folder)
    shard_of = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for shard in set(shard_of.values()):
        save_file({name: tensors[name] for name in tensors if shard_of[name] == shard}, folder / shard)
    write_index(folder, shard_of)
    return shard_of


def refusal(folder: Path | str) -> str:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder)
    return str(caught.value)


def assert_parts(message: str, parts: Iterable[str]) -> None:
    assert [part for part in parts if part not in message] == [], message


def assert_equals_library(checkpoint: Checkpoint, files: Iterable[Path]) -> None:
    seen = set()
    for file in files:
        with safe_open(file, "pt") as stored:
            for name in set(stored.keys()) & set(checkpoint.names()):
                expected = stored.get_tensor(name)
                bits = expected.view(torch.uint16) if expected.dtype == torch.bfloat16 else expected
                found = checkpoint.array(name)
                assert found.shape == tuple(expected.shape)
                np.testing.assert_array_equal(found, bits.numpy(), strict=True)
                seen.add(name)
    assert seen == set(checkpoint.names()) == set(SPEC.tensors())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_array_equals_what_the_library_reads(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = random_tensors(dtype)
    file = write_single(tmp_path, tensors)
    checkpoint = Checkpoint.open(str(tmp_path))
    assert checkpoint.folder == tmp_path
    assert checkpoint.spec == SPEC
    assert checkpoint.names() == tuple(SPEC.tensors())
    assert checkpoint.nbytes() == sum(tensors[name].nbytes for name in SPEC.tensors())
    assert_equals_library(checkpoint, [file])


def test_shards_are_read_as_one_checkpoint(tmp_path: Path) -> None:
    shard_of = write_shards(tmp_path, random_tensors())
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.info(NORM).file == tmp_path / shard_of[NORM]
    assert_equals_library(checkpoint, {tmp_path / shard for shard in shard_of.values()})


def test_a_model_saved_by_transformers_opens(tmp_path: Path) -> None:
    torch.manual_seed(0)
    DiffusionGemmaForBlockDiffusion(DiffusionGemmaConfig.from_dict(CONFIG)).save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.spec == SPEC
    assert_equals_library(checkpoint, [tmp_path / "model.safetensors"])


def test_info_gives_the_place_of_the_bytes(tmp_path: Path) -> None:
    tensors = random_tensors()
    file = write_single(tmp_path, tensors)
    info = Checkpoint.open(tmp_path).info(EXPERTS)
    assert (info.name, info.dtype, info.shape, info.file) == (EXPERTS, "BF16", (2, 8, 16), file)
    stored = file.read_bytes()[info.offset : info.offset + info.nbytes]
    assert stored == tensors[EXPERTS].view(torch.uint16).numpy().tobytes()


def test_arrays_are_read_only_views_of_one_mapping(tmp_path: Path) -> None:
    write_single(tmp_path, random_tensors())
    checkpoint = Checkpoint.open(tmp_path)
    array = checkpoint.array(NORM)
    assert not array.flags.owndata
    assert np.shares_memory(array, checkpoint.array(NORM))
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 0


def test_an_unaligned_tensor_is_still_readable(tmp_path: Path) -> None:
    tensors = random_tensors(torch.float32) | {VISION: torch.zeros(3, dtype=torch.uint8)}
    file = write_single(tmp_path, tensors)
    header_bytes = struct.unpack("<Q", file.read_bytes()[:8])[0]
    header, data = file.read_bytes()[8 : 8 + header_bytes], file.read_bytes()[8 + header_bytes :]
    file.write_bytes(struct.pack("<Q", header_bytes + 1) + header + b" " + data)
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.info(NORM).offset % 4 == 1
    np.testing.assert_array_equal(checkpoint.array(NORM), tensors[NORM].numpy())


def test_open_reads_no_tensor_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_single(tmp_path, random_tensors())

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("mapped while opening")

    monkeypatch.setattr(np, "memmap", refuse)
    Checkpoint.open(tmp_path)


def test_an_unknown_name_is_refused(tmp_path: Path) -> None:
    write_single(tmp_path, random_tensors())
    checkpoint = Checkpoint.open(tmp_path)
    for name in ("lm_head.weight", VISION):
        with pytest.raises(CheckpointError, match=f"no text tensor is named '{name}'"):
            checkpoint.array(name)


def test_a_file_cut_after_opening_is_refused_instead_of_crashing(tmp_path: Path) -> None:
    file = write_single(tmp_path, random_tensors())
    checkpoint = Checkpoint.open(tmp_path)
    last = max((checkpoint.info(name) for name in checkpoint.names()), key=lambda info: info.offset)
    file.write_bytes(file.read_bytes()[: last.offset + last.nbytes - 3])
    with pytest.raises(CheckpointError, match="3 bytes were cut off since it was opened"):
        checkpoint.array(EMBEDDING)


@pytest.mark.parametrize("cut", [1, 700])
def test_a_truncated_file_tells_how_many_bytes_are_short(tmp_path: Path, cut: int) -> None:
    file = write_single(tmp_path, random_tensors())
    file.write_bytes(file.read_bytes()[:-cut])
    assert_parts(refusal(tmp_path), [str(file), f"{cut} bytes short", "Download or copy the file again"])


def test_a_file_cut_within_its_header_is_short(tmp_path: Path) -> None:
    file = write_single(tmp_path, random_tensors())
    file.write_bytes(file.read_bytes()[:100])
    assert_parts(refusal(tmp_path), [str(file), "bytes short"])


Header = dict[str, Any]


def entry(**fields: Any) -> Callable[[Header], None]:
    return lambda header: header[NORM].update(fields)


def shifted(header: Header) -> None:
    last = max((name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"])
    header[last]["data_offsets"] = [offset - 2 for offset in header[last]["data_offsets"]]


def gapped(header: Header) -> None:
    last = max((name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"])
    header[last]["data_offsets"] = [offset + 2 for offset in header[last]["data_offsets"]]


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (shifted, ["overlaps"]),
        (gapped, ["leaves a gap after"]),
        (entry(shape=[17]), [NORM, "takes 32 bytes", "BF16 [17] takes 34"]),
        (entry(shape=[-16]), [NORM, "no valid dtype, shape and data_offsets"]),
        (entry(shape=[True]), [NORM, "no valid dtype, shape and data_offsets"]),
        (entry(data_offsets=[0]), [NORM, "no valid dtype, shape and data_offsets"]),
        (entry(data_offsets=[64, 32]), [NORM, "takes -32 bytes"]),
        (entry(dtype="Q3"), [NORM, "unknown dtype 'Q3'"]),
        (entry(dtype=None), [NORM, "no valid dtype"]),
        (lambda header: header.update({NORM: 3}), [NORM, "no valid dtype"]),
    ],
)
def test_a_header_that_contradicts_itself_is_refused(
    tmp_path: Path, damage: Callable[[Header], None], parts: list[str]
) -> None:
    file = write_single(tmp_path, random_tensors())
    content = file.read_bytes()
    end = 8 + struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8:end])
    damage(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[end:])
    assert_parts(refusal(tmp_path), [str(file), "not a valid safetensors file", "again", *parts])


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "0 bytes are too few"),
        (struct.pack("<Q", 2**60), "header of 1152921504606846976 bytes"),
        (struct.pack("<Q", 3) + b"{x}", "not valid JSON"),
        (struct.pack("<Q", 2) + b"\xff\xfe", "not valid JSON"),
        (struct.pack("<Q", 2) + b"[]", "not a JSON object"),
        (struct.pack("<Q", 13) + b'{"a":1,"a":2}', "'a' occurs twice"),
        (struct.pack("<Q", 2) + b"{}rest", "4 bytes longer"),
    ],
)
def test_a_file_that_is_no_safetensors_is_refused(tmp_path: Path, content: bytes, part: str) -> None:
    write_config(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    assert_parts(refusal(tmp_path), [str(tmp_path / "model.safetensors"), "not a valid safetensors file", part])


def test_a_directory_in_the_place_of_the_file_is_refused(tmp_path: Path) -> None:
    write_config(tmp_path)
    (tmp_path / "model.safetensors").mkdir()
    assert_parts(refusal(tmp_path), ["model.safetensors", "cannot be read"])


def test_missing_tensors_are_counted_and_five_are_named(tmp_path: Path) -> None:
    absent = list(SPEC.tensors())[:7]
    write_single(tmp_path, {name: value for name, value in random_tensors().items() if name not in absent})
    message = refusal(tmp_path)
    assert_parts(message, ["7 missing tensors", f"{EMBEDDING} [24, 16]", absent[4], "+ 2 more", "config.json"])
    assert absent[5] not in message


def test_an_unexpected_tensor_is_refused_and_vision_is_not(tmp_path: Path) -> None:
    write_single(tmp_path, random_tensors() | {"model.decoder.layers.2.layer_scalar": torch.zeros(1)})
    assert_parts(refusal(tmp_path), ["1 unexpected tensors", "model.decoder.layers.2.layer_scalar [1]"])


def test_a_wrong_shape_tells_found_and_expected(tmp_path: Path) -> None:
    write_single(tmp_path, random_tensors() | {NORM: torch.zeros(17, dtype=torch.bfloat16)})
    assert_parts(refusal(tmp_path), [f"{NORM}: found [17], expected [16]"])


def test_a_wrong_dtype_tells_the_types_that_are_read(tmp_path: Path) -> None:
    write_single(tmp_path, random_tensors() | {NORM: torch.zeros(16, dtype=torch.float64)})
    assert_parts(refusal(tmp_path), ["wrong dtype", "expected BF16, F16, F32", f"{NORM}: found F64"])


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    shard = write_shards(tmp_path, random_tensors())[NORM]
    (tmp_path / shard).unlink()
    assert_parts(refusal(tmp_path), [shard, "the shard is missing", "Download it"])


def test_a_tensor_listed_in_another_shard_is_refused(tmp_path: Path) -> None:
    shard_of = write_shards(tmp_path, random_tensors())
    (other,) = set(shard_of.values()) - {shard_of[NORM]}
    write_index(tmp_path, shard_of | {NORM: other})
    assert_parts(refusal(tmp_path), ["index.json", "not in their shards", f"{NORM} in {other}", "download both again"])


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    tensors = random_tensors()
    shard_of = write_shards(tmp_path, tensors)
    for shard in set(shard_of.values()):
        names = [name for name in tensors if shard_of[name] == shard]
        save_file({name: tensors[name] for name in {*names, NORM}}, tmp_path / shard)
    assert_parts(refusal(tmp_path), [f"tensor {NORM} is also in", "model-00001-of-00002.safetensors"])


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "a\\b.safetensors", "weights.bin", 3]
)
def test_an_index_that_leaves_the_folder_is_refused(tmp_path: Path, name: object) -> None:
    folder = tmp_path / "model"
    shard_of = write_shards(folder, random_tensors())
    save_file(random_tensors(), tmp_path / "model.safetensors")
    write_index(folder, shard_of | {NORM: name})
    assert_parts(refusal(folder), ["index.json", NORM, repr(name), "not the plain name", "Do not trust"])


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": {}}', "{"])
def test_an_index_without_content_is_refused(tmp_path: Path, content: str) -> None:
    write_config(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(content)
    assert_parts(refusal(tmp_path), ["model.safetensors.index.json", "again"])


def test_links_to_files_elsewhere_are_followed_as_in_the_hugging_face_cache(tmp_path: Path) -> None:
    file = write_single(tmp_path / "model", random_tensors())
    file.rename(tmp_path / "blob")
    file.symlink_to(tmp_path / "blob")
    assert Checkpoint.open(tmp_path / "model").array(NORM).shape == (16,)


@pytest.mark.parametrize("where", ["outer", "text", "file"])
def test_an_unknown_quantization_is_refused_before_its_tensors(tmp_path: Path, where: str) -> None:
    quantization = {"quantization_config": {"quant_method": "modelopt"}}
    nested = {"text_config": CONFIG["text_config"] | quantization}
    write_config(tmp_path, **{"outer": quantization, "text": nested, "file": {}}[where])
    if where == "file":
        (tmp_path / "hf_quant_config.json").write_text("{}")
    assert_parts(refusal(tmp_path), ["quant", "this version cannot run that", "the BF16 checkpoint"])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn])
def test_quantized_experts_without_a_declaration_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    name = "model.decoder.layers.0.experts.0.gate_proj.weight"
    write_single(tmp_path, random_tensors() | {name: torch.zeros(4, 8).to(dtype)})
    assert_parts(
        refusal(tmp_path), [f"unexpected tensors: {name}", "quantized checkpoint, but neither", "hf_quant_config.json"]
    )


def test_a_pickle_only_folder_is_refused(tmp_path: Path) -> None:
    write_config(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    assert_parts(refusal(tmp_path), [str(tmp_path), "pytorch_model.bin", "safetensors only"])


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    write_config(tmp_path)
    assert_parts(refusal(tmp_path), [str(tmp_path), "no weights", "model.safetensors", "Download"])


def test_a_model_id_tells_how_to_download_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = "google/diffusiongemma-26B-A4B-it"
    assert_parts(refusal(model), [model, "no such folder", f"hf download {model} --local-dir DIR"])

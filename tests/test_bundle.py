"""Engine bundles: written whole or not at all, opened only when every byte is as it was written."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import bundles
from canvasrt.bundle.manifest import MANIFEST
from canvasrt.bundle.reader import EngineBundle, Verify, read_manifest
from canvasrt.errors import BundleError

FILES = [
    "build.log", "chat_template.jinja", "config.json", "generation_config.json", "manifest.json", "text.engine",
    "tokenizer.json", "tokenizer_config.json",
]  # fmt: skip


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return bundles.checkpoint(tmp_path / "dg-nvfp4")


@pytest.fixture
def bundle(tmp_path: Path, source: Path) -> Path:
    target = tmp_path / "engines" / "dg-rtx-5090"
    bundles.write(target, source)
    return target


def refusal(path: Path, verify: Verify = "full") -> str:
    with pytest.raises(BundleError) as caught:
        EngineBundle.open(path, verify)
    return str(caught.value)


def rewrite(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Edits the manifest as somebody with a text editor would, and makes its own hash right again."""
    content = json.loads((bundle / MANIFEST).read_text())
    change(content)
    content["self_sha256"] = "0" * 64
    blank = json.dumps(content)
    digest = hashlib.sha256(blank.encode()).hexdigest()
    (bundle / MANIFEST).write_text(blank.replace("0" * 64, digest, 1))


def test_what_was_written_is_what_is_read(tmp_path: Path, source: Path) -> None:
    target = tmp_path / "engines" / "dg"
    written = bundles.write(target, source)
    opened = EngineBundle.open(target)
    assert opened.manifest == written == read_manifest(target)
    assert sorted(file.name for file in target.iterdir()) == FILES
    assert [file.name for file in target.parent.iterdir()] == ["dg"]
    assert sorted(written.files) == [name for name in FILES if name != MANIFEST]
    for name, entry in written.files.items():
        content = (target / name).read_bytes()
        assert (entry.nbytes, entry.sha256) == (len(content), hashlib.sha256(content).hexdigest())
        if name not in ("build.log", "text.engine"):
            assert content == (source / name).read_bytes()
    assert written.created > "2026-01-01T00:00:00Z"
    assert opened.file("config.json") == target / "config.json"


def test_an_engine_is_mapped_and_can_not_be_changed(bundle: Path) -> None:
    plan = EngineBundle.open(bundle).engine("text")
    assert plan == bundles.PLAN
    assert plan.readonly
    shutil.rmtree(bundle)
    assert plan == bundles.PLAN


def test_names_that_a_bundle_does_not_have_are_refused(bundle: Path) -> None:
    opened = EngineBundle.open(bundle)
    with pytest.raises(BundleError, match=r"has no engine 'vision': there are text"):
        opened.engine("vision")
    with pytest.raises(BundleError, match=r"has no file '../x': there are config.json, "):
        opened.file("../x")


def test_several_engines_fit_in(tmp_path: Path, source: Path) -> None:
    vision = bundles.engine(file="build.log", shape_ranges={"images": {}}, build={"seconds": 1})
    bundles.write(tmp_path / "two", source, engines={"text": bundles.engine(), "vision": vision})
    opened = EngineBundle.open(tmp_path / "two")
    assert opened.engine("vision") == b"built\n"
    assert list(opened.manifest.engines) == ["text", "vision"]


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_byte_in_any_file_is_found_and_named(bundle: Path, name: str) -> None:
    content = (bundle / name).read_bytes()
    for place in {0, 1, len(content) // 3, len(content) // 2, len(content) - 1}:
        changed = bytearray(content)
        changed[place] ^= 1
        (bundle / name).write_bytes(changed)
        message = refusal(bundle)
        assert name in message
        if name != MANIFEST:
            found, wanted = (hashlib.sha256(each).hexdigest() for each in (changed, content))
            assert f"{name} has the SHA-256 {found}, the manifest says {wanted}" in message
            assert f"canvasrt build --checkpoint dg-nvfp4 --profile rtx-5090 --out {bundle} --force" in message
            EngineBundle.open(bundle, "sizes")  # says nothing of contents


def test_no_byte_of_the_manifest_can_change(tmp_path: Path, source: Path) -> None:
    bundle = tmp_path / "small"
    bundles.write(bundle, source, engines={"text": bundles.engine(tensors=bundles.tensors(0))})
    content = (bundle / MANIFEST).read_bytes()
    for place in range(0, len(content), 5):
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        (bundle / MANIFEST).write_bytes(changed)
        with pytest.raises(BundleError, match=MANIFEST):
            read_manifest(bundle)


@pytest.mark.parametrize("verify", ["full", "sizes"])
@pytest.mark.parametrize("name", [name for name in FILES if name != MANIFEST])
def test_a_file_that_is_missing_or_of_another_size_is_named(bundle: Path, name: str, verify: Verify) -> None:
    content = (bundle / name).read_bytes()
    (bundle / name).write_bytes(content + b"x")
    assert f"{name} has {len(content) + 1:,} bytes, the manifest says {len(content):,}" in refusal(bundle, verify)
    (bundle / name).unlink()
    assert f"{name} is missing. Copy the bundle again, or build it again: canvasrt build" in refusal(bundle, verify)
    (bundle / name).mkdir()
    assert f"{name} is not a file" in refusal(bundle, verify)


def test_links_are_refused_within_a_bundle_and_followed_to_it(bundle: Path) -> None:
    (bundle.parent / "current").symlink_to(bundle.name)
    assert EngineBundle.open(bundle.parent / "current").engine("text") == bundles.PLAN
    shutil.move(bundle / "text.engine", bundle.parent / "elsewhere")
    (bundle / "text.engine").symlink_to(bundle.parent / "elsewhere")
    assert "text.engine is a link" in refusal(bundle)


def test_a_plan_that_shrinks_after_it_was_checked_is_not_mapped(bundle: Path) -> None:
    opened = EngineBundle.open(bundle)
    (bundle / "text.engine").write_bytes(b"short")
    with pytest.raises(BundleError, match="has changed size since it was checked"):
        opened.engine("text")
    (bundle / "text.engine").unlink()
    with pytest.raises(BundleError, match=r"text.engine can't be read"):
        opened.engine("text")


def test_what_is_no_bundle_is_refused_and_told_apart(tmp_path: Path, bundle: Path) -> None:
    assert "does not exist: name the folder of a bundle, or make one with canvasrt build" in refusal(tmp_path / "no")
    assert "is not a folder: name the folder of the bundle" in refusal(bundle / "text.engine")
    assert "is not a bundle: it holds no manifest.json" in refusal(tmp_path)
    (bundle / MANIFEST).unlink()
    (bundle / MANIFEST).mkdir()
    assert "manifest.json can't be read: Is a directory" in refusal(bundle)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is not JSON"),
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("\udcff", "is not JSON"),
        ("[]", "has no format_version"),
        ('{"name": "a web app"}', "has no format_version"),
        ('{"format_version": "1"}', "has no format_version"),
        ('{"format_version": true}', "has no format_version"),
        ('{"format_version": 1}', "missing key build_id; missing key canvasrt; "),
    ],
)
def test_a_manifest_that_is_none_is_refused(bundle: Path, text: str, said: str) -> None:
    (bundle / MANIFEST).write_bytes(text.encode(errors="surrogateescape"))
    assert said in refusal(bundle)


def test_a_newer_format_asks_for_an_upgrade_and_an_older_one_for_a_build(bundle: Path) -> None:
    rewrite(bundle, lambda content: content.update(format_version=2, something="new"))
    assert "format version 2, this canvasrt reads 1: the bundle was built by a newer canvasrt. Upgrade" in refusal(
        bundle
    )
    rewrite(bundle, lambda content: content.update(format_version=0, weights="stripped"))
    command = f"canvasrt build --checkpoint dg-nvfp4 --profile rtx-5090 --out {bundle} --weights stripped --force"
    assert refusal(bundle).endswith(f"build it again: {command}")
    (bundle / MANIFEST).write_text('{"format_version": 0, "checkpoint": 3, "target": {"profile": ""}}')
    assert f"canvasrt build --checkpoint CHECKPOINT --profile PROFILE --out {bundle} --force" in refusal(bundle)


SECTIONS: dict[str, list[str | int]] = {  # a key that must be there, and where
    "shapes": [], "name": ["compiler"], "profile": ["target"], "layout": ["checkpoint"], "chunk": ["shapes"],
    "formulation": ["moe"], "reason": ["reasons", 0], "tensors": ["engines", "text"],
    "seconds": ["engines", "text", "build"], "dtype": ["engines", "text", "tensors", 0],
    "shape_range": ["engines", "text", "build", "reserved", 0],
    "opt": ["engines", "text", "shape_ranges", "encoder", "tokens"], "sha256": ["files", "build.log"],
}  # fmt: skip


@pytest.mark.parametrize(("key", "section"), SECTIONS.items(), ids=SECTIONS)
def test_unknown_and_missing_keys_are_named_wherever_they_are(bundle: Path, key: str, section: list[str | int]) -> None:
    def at(content: Any) -> dict[str, Any]:
        for part in section:
            content = content[part]
        assert isinstance(content, dict)
        return content

    prefix = "".join(f"{part}." for part in section)
    rewrite(bundle, lambda content: at(content).update(colour="red"))
    assert f"unknown key {prefix}colour" in refusal(bundle)
    rewrite(bundle, lambda content: (at(content).pop("colour"), at(content).pop(key)))
    assert f"missing key {prefix}{key}" in refusal(bundle)


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a/b", "a\\b", "..", ".", "", ".hidden", "a\nb", "ä", "x" * 200]
)
def test_a_name_that_could_lead_out_of_the_folder_is_refused(bundle: Path, name: str) -> None:
    entry = {"sha256": hashlib.sha256(b"").hexdigest(), "nbytes": 0}
    part = {"file": name, "offset": 0, "nbytes": 4, "tensor": "t", "count": 1}
    weight = {"name": "w", "dtype": "fp32", "shape": [1], "nbytes": 4, "transform": "copy", "parts": [part]}
    original = (bundle / MANIFEST).read_bytes()
    changes: list[Callable[[Any], object]] = [
        lambda content: content["files"].update({name: entry}),
        lambda content: content.update(log=name),
        lambda content: content["engines"]["text"].update(file=name),
        lambda content: content["engines"]["text"].update(weight_map=[weight]),
    ]
    for change in changes:
        (bundle / MANIFEST).write_bytes(original)
        rewrite(bundle, change)
        assert "is not a plain file name and could lead out of the folder: do not trust this bundle" in refusal(bundle)


GIVEN = {"name": "tokens", "dtype": "bf16", "shape": [3], "nbytes": 6, "transform": "copy", "file": "build.log"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m["files"].pop("text.engine"), "engines.text.file: text.engine is not among files"),
        (lambda m: m.update(log="other.log"), "log: other.log is not among files"),
        (lambda m: m["files"]["text.engine"].update(nbytes=0), "text.engine is empty"),
        (lambda m: m["files"].update({MANIFEST: m["files"]["build.log"]}), "manifest.json can't list itself"),
        (lambda m: m.update(engines={}), "engines: "),
        (lambda m: m.update(weights="stripped"), "says nothing of how to fill the stripped weights"),
        (lambda m: m["shapes"].update(slots=0), "shapes.slots: Input should be greater than or equal to 1"),
        (lambda m: m["shapes"].update(slots="4"), "shapes.slots: Input should be a valid integer"),
        (lambda m: m["shapes"].update(slots=4.5), "shapes.slots: Input should be a valid integer"),
        (lambda m: m["compiler"].update(name="onnx"), "compiler.name: "),
        (lambda m: m["target"].update(compute_capability="sm_120"), "target.compute_capability: "),
        (lambda m: m.update(created="yesterday"), "created: "),
        (lambda m: m["files"]["build.log"].update(sha256="A" * 64), "files.build.log.sha256: "),
        (lambda m: m["engines"]["text"].update(shape_ranges={}), "engines.text.shape_ranges: "),
        (lambda m: m["engines"]["text"]["shape_ranges"].update(other={"entropy": {"min": [1], "opt": [1], "max": [1]}}),
         "shape range other speaks of entropy, which is no input"),
        (lambda m: m["engines"]["text"]["shape_ranges"]["encoder"]["tokens"].update(min=[9, 1]), "not in that order"),
        (lambda m: m["engines"]["text"]["shape_ranges"]["encoder"]["tokens"].update(min=[1]), "numbers of dimensions"),
        (lambda m: m["engines"]["text"]["tensors"].append(m["engines"]["text"]["tensors"][0]), "have the same name"),
        (lambda m: m["engines"]["text"]["tensors"][-1].update(aliases="no"), "aliases no, which is no other"),
        (lambda m: m["engines"]["text"]["tensors"][0].update(aliases="tokens"), "aliases tokens, which is no"),
        (lambda m: m["engines"]["text"]["tensors"][0].update(aliases="entropy"), "aliases entropy, which is no other"),
        (lambda m: m["engines"]["text"].update(given=[GIVEN | {"name": "entropy"}]), "has none of that name"),
        (lambda m: m["engines"]["text"].update(given=[GIVEN | {"file": "no"}]), "tokens wants 6 bytes of no"),
        (lambda m: m["engines"]["text"].update(given=[GIVEN | {"nbytes": 5}]), "tokens wants 5 bytes of build.log"),
        (lambda m: m["engines"]["text"].update(given=[GIVEN | {"file": "../x"}]), "is not a plain file name"),
        (lambda m: m["engines"]["text"]["build"]["reserved"][0].update(shape_range="x"), "which is no shape range"),
        (lambda m: m["engines"]["text"]["build"].update(seconds=-1), "engines.text.build.seconds: "),
        (lambda m: m["reasons"].extend([{"what": "", "value": "", "reason": ""}] * 5), " + 5 more"),
    ],
)  # fmt: skip
def test_a_manifest_that_contradicts_itself_is_refused(
    bundle: Path, change: Callable[[Any], object], said: str
) -> None:
    rewrite(bundle, change)
    assert said in refusal(bundle)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"nbytes": 8191}, "takes 8191 bytes, its parts have 8192"),
        ({"transform": "concat", "nbytes": 4096}, "takes 4096 bytes, its parts have 8192"),
        ({"parts": 2, "nbytes": 16_384}, "is a copy of 2 parts"),
        ({"count": 2}, "takes 8192 bytes, its parts have 16384"),
        ({"count": 2, "nbytes": 16_384}, None),
        ({"transform": "bf16", "nbytes": 4096}, None),
        ({"parts": 2, "nbytes": 16_384, "transform": "concat"}, None),
    ],
)
def test_a_stripped_bundle_says_what_fills_it_and_it_adds_up(
    tmp_path: Path, source: Path, change: dict[str, Any], said: str | None
) -> None:
    entry = bundles.weight_map(source)[0] | change
    if isinstance(entry["parts"], int):
        entry["parts"] = bundles.weight_map(source)[0]["parts"] * entry["parts"]
    entry["parts"][0]["count"] = entry.pop("count", 1)
    engines = {"text": bundles.engine(weight_map=[entry])}
    if said is None:
        bundles.write(tmp_path / "out", source, weights="stripped", engines=engines)
        (found,) = EngineBundle.open(tmp_path / "out").manifest.engines["text"].weight_map
        assert found.model_dump(mode="json") == entry | {"columns": 0, "file": None}
    else:
        with pytest.raises(ValueError, match=said):
            bundles.write(tmp_path / "out", source, weights="stripped", engines=engines)
        assert not (tmp_path / "out").exists()


def test_a_weight_that_is_an_input_lies_in_the_bundle_or_in_the_checkpoint(tmp_path: Path, source: Path) -> None:
    rows = {"name": "rows", "mode": "input", "dtype": "int32", "shape": [3], "aliases": "tokens"}
    tensors = [*bundles.tensors(1), rows]
    bundles.write(tmp_path / "own", source, engines={"text": bundles.engine(tensors=tensors, given=[GIVEN])})
    own = EngineBundle.open(tmp_path / "own")
    (weight,) = own.manifest.engines["text"].given
    assert own.map(str(weight.file)) == b"built\n"
    assert not own.manifest.needs_checkpoint
    other = bundles.weight_map(source)[0] | {"name": "tokens"}
    bundles.write(tmp_path / "other", source, engines={"text": bundles.engine(tensors=tensors, given=[GIVEN, other])})
    assert EngineBundle.open(tmp_path / "other").manifest.needs_checkpoint
    with pytest.raises(BundleError, match=r"has no file 'other.bin'"):
        own.map("other.bin")


def test_who_needs_the_checkpoint(tmp_path: Path, source: Path, bundle: Path) -> None:
    assert not EngineBundle.open(bundle).manifest.needs_checkpoint
    engines = {"text": bundles.engine(weight_map=bundles.weight_map(source))}
    for weights, needs in (("stripped", True), ("none", False)):
        bundles.write(tmp_path / weights, source, weights=weights, engines=engines)
        assert EngineBundle.open(tmp_path / weights).manifest.needs_checkpoint == needs


def test_a_writer_never_makes_what_a_reader_refuses(tmp_path: Path, source: Path) -> None:
    with pytest.raises(BundleError, match=r"would contradict itself: .*text.weight_map: weights are inside the plan"):
        bundles.write(tmp_path / "out", source, engines={"text": bundles.engine(weight_map=bundles.weight_map(source))})
    assert not (tmp_path / "out").exists()

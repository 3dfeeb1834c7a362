"""The pipeline file: what it may say, where that leads, and every mistake named with its fix."""

from pathlib import Path
from typing import Any

import pytest

from canvasrt.errors import InputError
from canvasrt.pipeline.product import Product, layout, resolve
from canvasrt.pipeline.settings import load_pipeline, parse_source
from pipelines import write
from planning import DEMO

HUB = {"source": "hf://org/model"}
BUNDLE = {"name": "b-1"}
GPU: dict[str, Any] = {"volume": "v", "profile": "rtx-5090", "checkpoint": HUB, "bundle": BUNDLE}
FETCHED = {"name": "b-1", "source": "s3://bucket/b"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"volum": "x"}, "unknown key volum: the keys are volume, profile, checkpoint"),
        ({"bundle": {"name": "b", "slot": 1}}, r"unknown key bundle\.slot: the keys are name, source, weights"),
        ({"volume": None}, "volume: Input should be a valid string"),
        ({"profile": "rtx-9"}, "no GPU profile is called 'rtx-9'"),
        ({"bundle": None}, r"profile rtx-5090 runs engines of tensorrt-rtx, so bundle\.name is missing"),
        ({"bundle": {"name": "a/b"}}, "'a/b' must be a plain folder name"),
        ({"bundle": {"name": ".."}}, "must be a plain folder name"),
        ({"bundle": {"name": "b.partial"}}, "ends like the names of unfinished things"),
        ({"bundle": FETCHED, "quantize": {"recipe": "fp8"}}, r"quantize and bundle\.source exclude each other"),
        ({"checkpoint": None}, r"checkpoint\.source is missing: say where"),
        ({"checkpoint": None, "bundle": {**FETCHED, "weights": "stripped"}}, r"bundle\.weights is stripped, so"),
        ({"profile": "cpu", "checkpoint": None, "bundle": FETCHED}, "profile cpu runs checkpoints and no bundles"),
        ({"quantize": {"recipe": "fp8", "device": "tpu"}}, r"quantize\.device: Input should be 'cpu' or 'cuda'"),
        ({"quantize": {"recipe": "fp8", "samples": 0}}, r"quantize\.samples: Input should be greater than"),
        ({"quantize": {"recipe": "../fp8"}}, r"'\.\./fp8' must be the name of a recipe"),
        ({"s3": {"endpoint": "minio:9000"}}, r"s3\.endpoint: String should match"),
        ({"s3": {"endpoint": "http://me:secret@minio"}}, r"s3\.endpoint: String should match"),
        ({"verify": "none"}, "verify: Input should be 'full' or 'sizes'"),
    ],
)
def test_a_mistake_is_named_with_its_key(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    content = {name: value for name, value in {**GPU, **changes}.items() if value is not None or name == "volume"}
    file = write(tmp_path / "pipeline.yaml", **content)
    with pytest.raises(InputError, match=message) as failed:
        load_pipeline(file)
    assert "secret" not in str(failed.value) or "endpoint" in changes.get("s3", {})


@pytest.mark.parametrize(
    "source",
    [
        "ftp://host/model", "hf://model", "hf://org/model/more", "hf://org/../etc", "hf://org/model@", "s3://bucket",
        "s3://bucket/", "s3://key:secret@bucket/prefix", "s3://bucket/../other", "oci://host", "oci://HOST/Upper",
        "oci://host/repo@sha256:12", "oci://user:secret@host/repo", "oci://host/repo:tag:tag", "file:///models",
    ],
)  # fmt: skip
def test_a_source_of_no_known_kind_is_refused_without_what_may_be_a_password(source: str, tmp_path: Path) -> None:
    file = write(tmp_path / "pipeline.yaml", **{**GPU, "checkpoint": {"source": source}})
    with pytest.raises(InputError, match=r"checkpoint\.source: .* is no source: give hf://ORG/NAME") as failed:
        load_pipeline(file)
    assert "secret" not in str(failed.value)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("hf://org/model", ("hf", "org/model", None)),
        ("hf://org/model@refs/pr/3", ("hf", "org/model", "refs/pr/3")),
        ("s3://bucket/a/b/", ("s3", "bucket", "a/b")),
        ("oci://host:5000/team/model", ("oci", "host:5000/team/model", None)),
        ("oci://host/model:1.0", ("oci", "host/model", "1.0")),
        (f"oci://host/model@sha256:{'0' * 64}", ("oci", "host/model", f"sha256:{'0' * 64}")),
        ("models/a", ("folder", "models/a", None)),
    ],
)
def test_sources_are_read(source: str, expected: tuple[str, str, str | None]) -> None:
    found = parse_source(source)
    assert (found.scheme, found.place, found.detail) == expected


def product(tmp_path: Path, **changes: Any) -> Product:
    return resolve(load_pipeline(write(tmp_path / "pipeline.yaml", **{**GPU, **changes})))


def test_what_a_pipeline_leads_to(tmp_path: Path) -> None:
    engines, checkpoints = Path("v/engines/b-1"), Path("v/checkpoints")
    assert product(tmp_path) == Product(engines, None, None)
    assert product(tmp_path, kernels="k") == Product(engines, None, Path("k/b-1.kernels"))
    stripped = product(tmp_path, bundle={**BUNDLE, "weights": "stripped"}, quantize={"recipe": "fp8"})
    assert (stripped.model, stripped.kernels) == (engines, None)
    assert stripped.checkpoint is not None
    assert stripped.checkpoint.parent == checkpoints
    assert stripped.checkpoint.name.startswith("org--model-")
    assert stripped.checkpoint.name.endswith("-fp8")
    assert product(tmp_path, checkpoint={"source": str(DEMO)}, profile="cpu") == Product(DEMO, None, None)
    # TensorRT compiles nothing on the GPU, so there are no kernels to keep.
    assert product(tmp_path, profile="h100", kernels="k").kernels is None


def test_whatever_decides_what_a_checkpoint_is_decides_its_folder(tmp_path: Path) -> None:
    def folder(**changes: Any) -> Path | None:
        return layout(load_pipeline(write(tmp_path / "p.yaml", **{**GPU, **changes}))).weights

    one = folder()
    others = [
        folder(checkpoint={"source": "hf://org/model@v2"}),
        folder(checkpoint={"source": "s3://org/model"}),
        folder(checkpoint={"source": "s3://org/model"}, s3={"endpoint": "http://minio:9000"}),
        folder(quantize={"recipe": "fp8"}),
        folder(quantize={"recipe": "fp8", "samples": 8}),
        folder(quantize={"recipe": "mine/fp8.yaml"}),
        folder(quantize={"recipe": "yours/fp8.yaml"}),
    ]
    assert len({one, *others}) == 1 + len(others)
    assert folder(quantize={"recipe": "fp8", "device": "cuda"}) == folder(quantize={"recipe": "fp8"})
    assert folder() == one

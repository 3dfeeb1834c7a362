"""The three kinds of servers that checkpoints are fetched from, each with the same files and the same faults."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import boto3
from moto.server import ThreadedMotoServer
from safetensors.torch import load_file, save

from canvasrt.pipeline.transfer import Credentials
from http_double import Answer, Asked, Double, serving_http
from hub_server import COMMIT, Repository, hub
from oci_registry import Artifact, registry
from pipelines import files_of, write
from planning import DEMO

KINDS = ("hf", "s3", "oci")
SECRET = "hunter2-never-print-me"
INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
LARGE, SMALL = SHARDS


@cache
def demo_files() -> dict[str, bytes]:
    """The demo checkpoint with its weights in two files, and what a publisher has beside them."""
    tensors = load_file(DEMO / "model.safetensors")
    names = sorted(tensors)
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    files = {name: content for name, content in files_of(DEMO).items() if name != "model.safetensors"}
    for shard, half in zip(SHARDS, halves, strict=True):
        files[shard] = save({name: tensors[name] for name in half})
    places = {name: shard for shard, half in zip(SHARDS, halves, strict=True) for name in half}
    files[INDEX] = json.dumps({"metadata": {}, "weight_map": places}).encode()
    return files


UNWANTED = {"README.md": b"# a model", "pytorch_model.bin": b"pickle", ".gitattributes": b"*", "training.pt": b"pickle"}


@dataclass
class Place:
    """One server with a source on it. ``server`` is told of faults, and tells what it was asked."""

    kind: str
    source: str
    server: Double
    held: Any = None  # what the server serves from
    settings: dict[str, Any] = field(default_factory=dict)
    credentials: Credentials = field(default_factory=Credentials)

    def file(self, folder: Path, **changes: Any) -> Path:
        content = {"volume": str(folder / "v"), "profile": "cpu", "checkpoint": {"source": self.source}}
        return write(folder / "pipeline.yaml", **{**content, **self.settings, **changes})

    def end(self, name: str) -> str:
        """How the path of a file's content ends."""
        if self.kind == "oci":
            from oci_registry import digest

            return digest(self.held.files[name])
        return name

    def count(self, name: str) -> int:
        return len(self.server.bodies(self.end(name)))


@contextmanager
def place(kind: str, files: dict[str, bytes] | None = None) -> Iterator[Place]:
    given = {**demo_files(), **UNWANTED} if files is None else files
    with {"hf": _hub, "s3": _bucket, "oci": _registry}[kind](given) as found:
        yield found


@contextmanager
def _hub(files: dict[str, bytes]) -> Iterator[Place]:
    # Folders of a repository are left out: `onnx`, and whatever else a publisher keeps there.
    repository = Repository("org/model", {**files, "onnx/config.json": b"{}"}, token=SECRET)
    with hub(repository) as server:
        credentials = Credentials(hf_token=SECRET, hf_endpoint=server.url)
        yield Place("hf", "hf://org/model", server, repository, {}, credentials)


@contextmanager
def _registry(files: dict[str, bytes]) -> Iterator[Place]:
    artifact = Artifact("team/model", files, asks="token", password=SECRET)
    with registry(artifact) as server:
        source = f"oci://{server.address}/team/model:1.0"
        credentials = Credentials(oci_username="reader", oci_password=SECRET)
        yield Place("oci", source, server, artifact, {"oci": {"insecure": True}}, credentials)


@contextmanager
def _bucket(files: dict[str, bytes]) -> Iterator[Place]:
    """moto, behind a server that can break connections."""
    moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    moto.start()
    try:
        _, port = moto.get_host_and_port()
        client = boto3.client(
            "s3",
            endpoint_url=f"http://127.0.0.1:{port}",
            region_name="us-east-1",
            aws_access_key_id="anybody",
            aws_secret_access_key="anything",
        )
        urlopen(Request(f"http://127.0.0.1:{port}/moto-api/reset", method="POST")).close()  # it is one for a process
        bucket = Bucket(client, port)
        client.create_bucket(Bucket="models", ACL="public-read")
        for name, content in {**files, "more/config.json": b"{}", "": b""}.items():
            client.put_object(Bucket="models", Key=f"team/model/{name}", Body=content, ACL="public-read")
        with serving_http(bucket.answer) as server:
            credentials = Credentials(aws_key="a-key-id-never-print", aws_secret=SECRET)
            settings = {"s3": {"endpoint": server.url, "region": "us-east-1"}}
            yield Place("s3", "s3://models/team/model", server, bucket, settings, credentials)
        client.close()
    finally:
        moto.stop()


@dataclass
class Bucket:
    client: Any
    port: int
    error: tuple[int, str] | None = None  # of every answer, in S3's words

    def answer(self, asked: Asked) -> Answer:
        if self.error is not None:
            status, code = self.error
            return Answer(status, f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode())
        connection = HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request(asked.method, asked.path, headers=dict(asked.headers))
            answer = connection.getresponse()
            body = answer.read()
            kept = ("etag", "content-range", "content-type", "last-modified")
            headers = {name: value for name, value in answer.getheaders() if name.lower() in kept}
            return Answer(answer.status, body, headers)
        finally:
            connection.close()


__all__ = ["COMMIT", "INDEX", "KINDS", "LARGE", "SECRET", "SMALL", "UNWANTED", "Place", "demo_files", "place"]

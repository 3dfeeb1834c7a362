"""As much of an OCI registry as pulling an artifact needs: manifest, blobs, and a challenge for a token or password."""

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from http_double import Answer, Asked, Double, serving_http

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
TITLE = "org.opencontainers.image.title"


@dataclass
class Artifact:
    """``files`` by title. ``asks``: how it asks for user and password, if at all."""

    repository: str
    files: dict[str, bytes]
    tag: str = "1.0"
    asks: Literal["token", "basic"] | None = None
    user: str = "reader"
    password: str = ""
    status: int | None = None
    ranges: bool = True
    wrong: dict[str, bytes] = field(default_factory=dict)  # what is sent in place of a file's content
    tokens: list[str] = field(default_factory=list)  # that were given, and are still good

    @property
    def manifest(self) -> bytes:
        layers: list[dict[str, Any]] = [
            {
                "mediaType": "application/octet-stream",
                "digest": digest(content),
                "size": len(content),
                "annotations": {TITLE: title},
            }
            for title, content in self.files.items()
        ]
        config = {"mediaType": "application/vnd.oci.empty.v1+json", "digest": digest(b"{}"), "size": 2}
        content = {"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": layers}
        return json.dumps(content).encode()

    def answer(self, asked: Asked) -> Answer:
        if asked.plain == "/token":
            return self._token(asked)
        if self.status is not None:
            return Answer(self.status)
        shown = asked.headers.get("Authorization", "")
        if self.asks == "token" and shown.removeprefix("Bearer ") not in self.tokens:
            challenge = f'Bearer realm="{asked.base}/token",service="test",scope="repository:{self.repository}:pull"'
            return Answer(401, headers={"WWW-Authenticate": challenge})
        if self.asks == "basic" and shown != self._basic():
            return Answer(401, headers={"WWW-Authenticate": 'Basic realm="test"'})
        root = f"/v2/{self.repository}"
        if asked.plain in (f"{root}/manifests/{self.tag}", f"{root}/manifests/{digest(self.manifest)}"):
            return Answer(200, self.manifest, {"Content-Type": MANIFEST})
        for title, content in self.files.items():
            if asked.plain == f"{root}/blobs/{digest(content)}":
                return Answer(200, self.wrong.get(title, content), ranges=self.ranges)
        return Answer(404)

    def _token(self, asked: Asked) -> Answer:
        if asked.headers.get("Authorization") != self._basic():
            return Answer(401)
        self.tokens.append(f"token-{len(self.tokens)}-for-a-while")
        return Answer(200, json.dumps({"token": self.tokens[-1]}).encode(), {"Content-Type": "application/json"})

    def _basic(self) -> str:
        return "Basic " + base64.b64encode(f"{self.user}:{self.password}".encode()).decode()


def digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


@contextmanager
def registry(artifact: Artifact) -> Iterator[Double]:
    with serving_http(artifact.answer) as double:
        yield double

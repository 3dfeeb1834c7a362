"""As much of the Hugging Face Hub as huggingface_hub asks for to fetch a repository, over files of a test."""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from http_double import Answer, Asked, Double, serving_http

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_LARGE = ".safetensors"  # kept in LFS, so named by its SHA-256; other files by git's hash


@dataclass
class Repository:
    """``files`` by path. ``token``: who does not show it gets 401. ``status``: of every answer, if not None."""

    name: str
    files: dict[str, bytes]
    token: str | None = None
    gated: bool = False
    status: int | None = None
    commits: dict[str, str] = field(default_factory=lambda: {"main": COMMIT})
    wrong: dict[str, bytes] = field(default_factory=dict)  # what is sent in place of a file's content

    def answer(self, asked: Asked) -> Answer:
        if self.status is not None:
            return Answer(self.status)
        if self.token is not None and asked.headers.get("authorization") != f"Bearer {self.token}":
            return Answer(401, headers={"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        if found := re.fullmatch(rf"/api/models/{self.name}(?:/revision/(.+))?", asked.plain):
            return self._info(found[1] or "main")
        if found := re.fullmatch(rf"/api/models/{self.name}/tree/(.+)", asked.plain):
            return self._tree(found[1])
        if found := re.fullmatch(rf"/{self.name}/resolve/(\w+)/(.+)", asked.plain):
            return self._file(found[1], found[2])
        return Answer(404, headers={"X-Error-Code": "RepoNotFound"})

    def _info(self, revision: str) -> Answer:
        commit = self.commits.get(revision)
        if commit is None and revision not in self.commits.values():
            return Answer(404, headers={"X-Error-Code": "RevisionNotFound"})
        return _json({"id": self.name, "sha": commit or revision, "siblings": []})

    def _tree(self, revision: str) -> Answer:
        if revision not in self.commits.values():
            return Answer(404, headers={"X-Error-Code": "RevisionNotFound"})
        entries: list[dict[str, object]] = []
        for path, content in self.files.items():
            entry: dict[str, object] = {"type": "file", "path": path, "size": len(content), "oid": _oid(content)}
            if path.endswith(_LARGE):
                entry["lfs"] = {"oid": _sha256(content), "size": len(content), "pointerSize": 134}
            entries.append(entry)
        return _json(entries)

    def _file(self, revision: str, path: str) -> Answer:
        content = self.files.get(path)
        if self.gated:
            return Answer(403, headers={"X-Error-Code": "GatedRepo", "X-Error-Message": "accept the terms"})
        if content is None or revision not in self.commits.values():
            return Answer(404, headers={"X-Error-Code": "EntryNotFound"})
        etag = _sha256(content) if path.endswith(_LARGE) else _oid(content)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": revision, "Accept-Ranges": "bytes"}
        return Answer(200, self.wrong.get(path, content), headers, ranges=True)


@contextmanager
def hub(repository: Repository) -> Iterator[Double]:
    with serving_http(repository.answer) as double:
        yield double


def _json(content: object) -> Answer:
    return Answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()

"""oci://HOST/REPOSITORY: an artifact of a registry, whose layers are files named by their title. The only importer of
oras.

Every byte is checked against its digest, from the manifest on. Knows nothing of what is done with the files.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import requests
from oras.container import Container
from oras.logger import logger
from oras.provider import Registry

from canvasrt.errors import CanvasRTError, InputError, ServerError
from canvasrt.pipeline import transfer as t
from canvasrt.pipeline.settings import Pipeline, Source

T = TypeVar("T")

_TITLE = "org.opencontainers.image.title"
_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_BLOCK_BYTES = 1 << 20
_MOST_BYTES = 4 << 20  # of a manifest
_TIMEOUT = (10, 60)  # seconds to connect, and between two pieces
_SECRET = "in Kubernetes: the Secret of model.oci"


class _Session(requests.Session):
    def request(self, *given: Any, **named: Any) -> requests.Response:
        answer = super().request(*given, **{"timeout": _TIMEOUT, **named})
        if not answer.ok:
            answer.close()  # oras drops a refusal that it was given as a stream, and with it an open connection
        return answer


class _Registry(Registry):  # type: ignore[misc]  # without types
    # Its own would repeat whatever fails, for minutes; ours are outside, where progress counts.
    do_request = Registry.do_request.__wrapped__


def connect(source: Source, pipeline: Pipeline, credentials: t.Credentials, kind: t.Kind) -> t.Origin:
    logger.quiet = True
    logger.logger.disabled = True  # it would tell refusals to standard error in its own words
    return _Artifact(source, pipeline.oci.insecure, credentials, kind)


class _Artifact:
    def __init__(self, source: Source, insecure: bool, credentials: t.Credentials, kind: t.Kind) -> None:
        self._source, self._insecure, self._credentials, self._kind = source, insecure, credentials, kind
        host, _, repository = source.place.partition("/")
        self._container = Container(repository, registry=host)
        self._registry = _Registry(host, insecure=insecure)
        self._registry.session = self._registry.auth.session = _Session()
        # Else oras looks for passwords that somebody has logged in with on this machine.
        self._registry.auth._auth_config = {"auths": {}}
        self._basic: bool | None = None  # whether the registry asks for the password itself; None: not known yet

    def listing(self, revision: str | None) -> t.Listing:
        """``revision`` is the manifest's digest."""
        wanted = revision or self._source.detail or "latest"
        return self._asked(lambda: self._manifest(wanted))

    def download(self, listing: t.Listing, files: tuple[t.RemoteFile, ...], folder: Path) -> None:
        def one(file: t.RemoteFile) -> None:
            self._asked(lambda: t.download_part(file, folder, lambda have: self._blob(file, have)))

        one(files[0])  # whose request gets the token that the others use
        t.several(one, files[1:])

    def close(self) -> None:
        self._registry.session.close()

    def _manifest(self, reference: str) -> t.Listing:
        url = f"{self._registry.prefix}://{self._container.manifest_url(reference)}"
        with self._get(url, {"Accept": _MANIFEST}, stream=True) as answer:
            content = answer.raw.read(_MOST_BYTES, decode_content=True)
        digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
        if reference.startswith("sha256:") and digest != reference:
            raise InputError(f"{self._source.text}: the manifest has the digest {digest}: do not trust this registry")
        try:
            layers = json.loads(content)["layers"]
            files = [file for layer in layers if (file := self._file(layer)) is not None]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise InputError(
                f"{self._source.text} is no artifact of files: its manifest lists no layers with digest, size and "
                "title. An image for several platforms is none either"
            ) from None
        return t.Listing(digest, tuple(files))

    def _file(self, layer: dict[str, Any]) -> t.RemoteFile | None:
        name = layer.get("annotations", {}).get(_TITLE)
        if name is None:
            return None
        digest, nbytes = str(layer["digest"]), layer["size"]
        kind, _, digits = digest.partition(":")
        if kind != "sha256" or len(digits) != 64 or not set(digits) <= set("0123456789abcdef"):
            raise ValueError(digest)
        if type(nbytes) is not int or nbytes < 0:
            raise ValueError(nbytes)
        if "/" in str(name) or ".." in str(name):
            raise InputError(
                f"{self._source.text} has a file named {str(name)[:100]!r}, which could lead out of its folder: do not "
                "trust this source, or push it again with plain names"
            )
        return t.RemoteFile(str(name), nbytes, digest, digest) if t.taken(str(name), self._kind) else None

    def _blob(self, file: t.RemoteFile, have: int) -> tuple[int, Iterable[bytes]]:
        url = f"{self._registry.prefix}://{self._container.get_blob_url(file.version)}"
        answer = self._get(url, {"Range": f"bytes={have}-"} if have else {}, stream=True)
        begins = answer.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        start = have if answer.status_code == requests.codes.partial_content and begins else 0
        return start, _content(answer)

    def _get(self, url: str, headers: dict[str, str], stream: bool) -> requests.Response:
        """Raises InputError or ServerError for any status but success."""
        self._authenticate()
        for _ in range(3):  # a token may have run out meanwhile, and be renewed by another thread
            try:
                ask = self._registry.session.request if self._basic else self._registry.do_request
                answer: requests.Response = ask(method="GET", url=url, headers=dict(headers), stream=stream)
            except ValueError as error:  # oras, where there is no token to be had
                if isinstance(error, requests.RequestException):
                    raise
                raise self._status(401) from None
            if answer.ok:
                return answer
            if answer.status_code != requests.codes.unauthorized:
                break
            self._registry.auth.token = None
        raise self._status(answer.status_code)

    def _authenticate(self) -> None:
        """Asks how the registry asks: oras would take the realm of a password for an address, and send it there."""
        if self._basic is not None:
            return
        root = f"{self._registry.prefix}://{self._container.registry}/v2/"
        with self._registry.session.request("GET", root, stream=True) as answer:
            self._basic = answer.headers.get("WWW-Authenticate", "").lower().startswith("basic")
        name, password = self._credentials.oci_username, self._credentials.oci_password
        if name is not None and password is not None:
            if self._basic:
                self._registry.session.auth = (name, password)  # requests drops it where it is sent elsewhere
            else:
                self._registry.auth.set_basic_auth(name, password)

    def _status(self, status: int) -> CanvasRTError:
        name = self._source.text
        if status in (401, 403):
            given = "are set" if self._credentials.oci_username else "are not set"
            return InputError(
                f"{name} is refused (HTTP {status}): OCI_USERNAME and OCI_PASSWORD {given}. Give those of an account "
                f"that may pull it ({_SECRET})"
            )
        if status == requests.codes.not_found:
            return InputError(f"{name} is not there (HTTP 404): check host, repository, and tag or digest")
        if status >= 500 or status in (408, 429):
            return ServerError(f"{name}: the registry answered HTTP {status}")
        return InputError(f"{name}: the registry answered HTTP {status}: check that it is a registry")

    def _asked(self, ask: Callable[[], T]) -> T:
        """Raises InputError or ServerError for what the registry or the network says."""
        name = self._source.text
        try:
            return ask()
        except requests.exceptions.SSLError:
            raise InputError(
                f"{name}: the registry's certificate is not trusted, or it does not speak TLS. For a registry without "
                "TLS in the cluster: oci.insecure: true; for a certificate of your own: REQUESTS_CA_BUNDLE"
            ) from None
        except requests.RequestException as error:
            said = self._credentials.scrub(str(error))[:200]
            raise ServerError(
                f"{name} can't be reached or cut the connection ({said}): check host and network"
            ) from None


def _content(answer: requests.Response) -> Iterator[bytes]:
    with answer:
        yield from answer.iter_content(_BLOCK_BYTES)

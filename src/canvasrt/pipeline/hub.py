"""hf://ORG/NAME[@REVISION]: files of a repository of the Hugging Face Hub, pinned to one commit. The only importer of
huggingface_hub.

Knows nothing of what is done with the files.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi, close_session, snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.tqdm import disable_progress_bars

from canvasrt.errors import CanvasRTError, InputError, ServerError
from canvasrt.pipeline import transfer as t
from canvasrt.pipeline.settings import Pipeline, Source

T = TypeVar("T")

_NETWORK = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3", "hf_xet")
_WORKERS = 4


def connect(source: Source, pipeline: Pipeline, credentials: t.Credentials, kind: t.Kind) -> t.Origin:
    disable_progress_bars()
    # It would warn with addresses that are signed, and so are keys for a while.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    return _Hub(source, credentials, kind)


class _Hub:
    def __init__(self, source: Source, credentials: t.Credentials, kind: t.Kind) -> None:
        self._source, self._credentials, self._kind = source, credentials, kind
        # False and not None: no token that somebody has logged in with on this machine.
        self._api = HfApi(endpoint=credentials.hf_endpoint, token=credentials.hf_token or False)

    def listing(self, revision: str | None) -> t.Listing:
        commit = revision or self._asked(self._commit)
        return t.Listing(commit, self._asked(lambda: self._files(commit)))

    def download(self, listing: t.Listing, files: tuple[t.RemoteFile, ...], folder: Path) -> None:
        self._asked(
            lambda: snapshot_download(
                self._source.place,
                revision=listing.revision,
                local_dir=folder,
                allow_patterns=[file.name for file in files],  # plain names: none of them is a pattern
                endpoint=self._credentials.hf_endpoint,
                token=self._credentials.hf_token or False,
                max_workers=_WORKERS,
            )
        )
        # It returns what is there, without an error, where the network is gone at the right moment.
        lacking = [file.name for file in files if not (folder / file.name).is_file()]
        if lacking:
            raise ServerError(f"{self._source.text}: {len(lacking)} files did not arrive, such as {lacking[0]}")

    def close(self) -> None:
        close_session()

    def _commit(self) -> str:
        commit = self._api.repo_info(self._source.place, revision=self._source.detail).sha
        if not commit:
            raise ServerError(f"{self._source.text}: the hub names no commit")
        return commit

    def _files(self, commit: str) -> tuple[t.RemoteFile, ...]:
        found = []
        for file in self._api.list_repo_tree(self._source.place, revision=commit):
            if isinstance(file, RepoFile) and "/" not in file.path and t.taken(file.path, self._kind):
                digest = f"git:{file.blob_id}" if file.lfs is None else f"sha256:{file.lfs.sha256}"
                found.append(t.RemoteFile(file.path, file.size, digest, digest))
        return tuple(found)

    def _asked(self, ask: Callable[[], T]) -> T:
        """Raises InputError or ServerError for what the hub or the network says."""
        try:
            return ask()
        except CanvasRTError:
            raise
        except Exception as error:
            raise self._meaning(error) from None

    def _meaning(self, error: Exception) -> Exception:
        name, token = self._source.text, self._credentials.hf_token
        has = "HF_TOKEN is set, and its account may lack access" if token else "HF_TOKEN is not set"
        ask = f"{has}. Put a token that may read it into HF_TOKEN (in Kubernetes: the Secret of model.token)"
        chain = list(_chain(error))
        if any(isinstance(each, GatedRepoError) for each in chain):
            return InputError(f"{name} is gated: accept its terms on the hub's page of it. {ask}")
        if any(isinstance(each, RevisionNotFoundError) for each in chain):
            return InputError(f"{name}: there is no revision {self._source.detail or 'main'}. Check the part behind @")
        if any(isinstance(each, RepositoryNotFoundError) for each in chain):
            return InputError(f"{name} does not exist, or is private: {ask}; else check the name")
        for each in chain:
            if isinstance(each, HfHubHTTPError) and each.response is not None:
                return self._status(each.response.status_code, ask)
        if any("certificate" in str(each).lower() for each in chain):
            return InputError(
                f"{name}: the server's certificate is not trusted. Where a proxy has one of its own, name its file in "
                "SSL_CERT_FILE"
            )
        if any(type(each).__module__.partition(".")[0] in _NETWORK for each in chain):
            last = self._credentials.scrub(str(chain[-1]))[:200]
            return ServerError(f"{name} can't be reached ({last or type(chain[-1]).__name__}): check network and proxy")
        system = next((each for each in chain if isinstance(each, OSError) and each.errno is not None), None)
        if system is not None:
            return t.disk_error(system, Path(str(system.filename or ".")))
        if isinstance(error, OSError):  # a file that has not the size that was announced
            return ServerError(f"{name}: {self._credentials.scrub(str(error))[:200]}")
        return error

    def _status(self, status: int, ask: str) -> Exception:
        if status in (401, 403):
            return InputError(f"{self._source.text} is refused (HTTP {status}): {ask}")
        if status == 404:
            return InputError(f"{self._source.text} is not there (HTTP 404): check the name")
        return ServerError(f"{self._source.text}: the hub answered HTTP {status}")


def _chain(error: BaseException | None) -> "list[BaseException]":
    """An error and what it came from."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found

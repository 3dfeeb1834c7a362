"""s3://BUCKET/PREFIX: objects of a bucket, AWS's or another with the same interface. The only importer of boto3.

Only objects directly under the prefix. Knows nothing of what is done with the files.
"""

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar

import boto3
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,  # noqa: A004  # botocore's own, which is none of Python's
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    ReadTimeoutError,
    ResponseStreamingError,
    SSLError,
)

from canvasrt.errors import CanvasRTError, InputError, ServerError
from canvasrt.pipeline import transfer as t
from canvasrt.pipeline.settings import Pipeline, Source

T = TypeVar("T")

_BLOCK_BYTES = 4 << 20
_KEYS = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
_SECRET = "in Kubernetes: the Secret of model.s3"
_REFUSED = ("403", "401", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken")
_MISSING = ("404", "NoSuchBucket", "NoSuchKey", "NotFound")
_CHANGED = ("412", "PreconditionFailed")


def connect(source: Source, pipeline: Pipeline, credentials: t.Credentials, kind: t.Kind) -> t.Origin:
    return _Bucket(source, pipeline, credentials, kind)


class _Bucket:
    def __init__(self, source: Source, pipeline: Pipeline, credentials: t.Credentials, kind: t.Kind) -> None:
        self._source, self._settings, self._credentials, self._kind = source, pipeline.s3, credentials, kind
        self._prefix = f"{source.detail}/"
        self._client = self._connected(signed=True)

    def _connected(self, signed: bool) -> Any:
        endpoint, given = self._settings.endpoint, self._credentials
        more: dict[str, Any] = {} if signed else {"signature_version": UNSIGNED}
        return boto3.client(
            "s3",
            endpoint_url=endpoint,
            region_name=self._settings.region or ("us-east-1" if endpoint else None),
            # None: what boto3 finds by itself, such as the role of a Pod's service account.
            aws_access_key_id=given.aws_key,
            aws_secret_access_key=given.aws_secret,
            aws_session_token=given.aws_session,
            config=Config(
                connect_timeout=10,
                read_timeout=60,
                retries={"mode": "standard", "total_max_attempts": 1},  # ours are outside, where progress counts
                # A server of one's own has seldom a host name for each bucket.
                s3={"addressing_style": "path" if endpoint else "auto"},
                **more,
            ),
        )

    def listing(self, revision: str | None) -> t.Listing:
        try:
            return t.Listing(None, self._asked(self._files))
        except NoCredentialsError:
            self.close()
            self._client = self._connected(signed=False)  # as for a bucket that everybody may read
            return t.Listing(None, self._asked(self._files))

    def download(self, listing: t.Listing, files: tuple[t.RemoteFile, ...], folder: Path) -> None:
        def one(file: t.RemoteFile) -> None:
            self._asked(lambda: t.download_part(file, folder, lambda have: (have, self._read(file, have))))

        t.several(one, files)

    def close(self) -> None:
        self._client.close()

    def _files(self) -> tuple[t.RemoteFile, ...]:
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self._source.place, Prefix=self._prefix, Delimiter="/"
        )
        objects = [entry for page in pages for entry in page.get("Contents", ())]
        found = []
        for entry in objects:
            name = entry["Key"].removeprefix(self._prefix)
            if name and t.taken(name, self._kind):  # no name: how some programs mark a folder
                found.append(t.RemoteFile(name, int(entry["Size"]), str(entry["ETag"])))
        return tuple(found)

    def _read(self, file: t.RemoteFile, have: int) -> Iterator[bytes]:
        if file.nbytes == 0:
            return
        answer = self._client.get_object(
            Bucket=self._source.place,
            Key=self._prefix + file.name,
            IfMatch=file.version,  # else parts of two objects could become one file
            Range=f"bytes={have}-",
        )
        with closing(answer["Body"]) as body:
            yield from body.iter_chunks(_BLOCK_BYTES)

    def _asked(self, ask: Callable[[], T]) -> T:
        """Raises InputError or ServerError for what the server or the network says."""
        try:
            return ask()
        except (CanvasRTError, NoCredentialsError):
            raise
        except ClientError as error:
            raise self._meaning(error) from None
        except SSLError:
            raise InputError(
                f"{self._source.text}: the server's certificate is not trusted, or it does not speak TLS. Check "
                "s3.endpoint; where it has a certificate of its own, name its file in AWS_CA_BUNDLE"
            ) from None
        except (
            ConnectionError,
            HTTPClientError,
            IncompleteReadError,
            ReadTimeoutError,
            ResponseStreamingError,
        ) as error:
            where = self._settings.endpoint or "the S3 service"
            said = self._credentials.scrub(str(error))[:200]
            raise ServerError(
                f"{self._source.text}: {where} can't be reached or cut the connection ({said}): check network and "
                "s3.endpoint"
            ) from None
        except BotoCoreError as error:  # a region that is missing, a profile that is not there
            raise InputError(f"{self._source.text}: {self._credentials.scrub(str(error))[:200]}") from None

    def _meaning(self, error: ClientError) -> CanvasRTError:
        code = str(error.response.get("Error", {}).get("Code", ""))
        status = str(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", ""))
        name = self._source.text
        if code in _REFUSED or status in ("401", "403"):
            keys = f"{_KEYS} are set" if self._credentials.aws_key else f"{_KEYS} are not set"
            return InputError(
                f"{name} is refused ({code}): {keys}. Give keys that may list and read it ({_SECRET}), or a role to "
                "the service account"
            )
        if code in _MISSING or status == "404":
            return InputError(f"{name} is not there ({code}): check bucket, s3.endpoint and s3.region")
        if code in _CHANGED or status == "412":
            return ServerError(f"{name} was changed while it was fetched")
        if status.startswith("5") or status == "429" or code in ("SlowDown", "RequestTimeout"):
            return ServerError(f"{name}: the server answered {code or status}")
        return InputError(f"{name}: the server answered {code or status}: check s3.endpoint and s3.region")

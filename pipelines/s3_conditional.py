"""Writes to S3 that happen only if an object is absent, or still what it was: what claims and leases are made of.

pyarrow, which does all else, has none (its issue 44281). They go through Amazon's own client, an extra of this package.
"""

import re
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import lru_cache
from typing import Any, TypeVar

from pipelines.errors import UserError, one_line
from pipelines.s3_connection import Endpoint

_WRITER = "ddpm-writer"
"""The metadata by which who tries again knows an object for its own, if the answer to the first attempt was lost."""

_making = threading.Lock()

T = TypeVar("T")


@dataclass(frozen=True)
class Seen:
    """An object as it was found."""

    data: bytes
    tag: str
    """Its ETag: another one after every write of other bytes."""
    age_seconds: float | None
    """Since it was written, by the server's clock to whole seconds; None where the server does not tell the time."""


class Conditional:
    """One object. What fails is an OSError in the words of pyarrow's, or a UserError; nothing is tried again here."""

    def __init__(self, bucket: str, key: str, connect_seconds: float, stall_seconds: float) -> None:
        self._at = {"Bucket": bucket, "Key": key}
        self._address = f"s3://{bucket}/{key}"
        with _making:  # takes half a second and is for all threads
            self._client = _client(Endpoint.of_environment(), connect_seconds, stall_seconds)

    def put(self, data: bytes, writer: str, tag: str | None) -> str | None:
        """Write the object if it still has this tag, or, with None, if it is absent; its new tag.

        None where it is otherwise. `writer` is the same in every attempt at one write, and in no other.
        """
        condition = {"IfNoneMatch": "*"} if tag is None else {"IfMatch": tag}

        def call() -> str | None:
            try:
                return self._client.put_object(**self._at, **condition, Body=data, Metadata={_WRITER: writer})["ETag"]
            except self._client.exceptions.ClientError as error:
                if not (_status(error) == 412 or (_status(error) == 404 and _code(error) == "NoSuchKey")):
                    raise
            try:
                found = self._client.head_object(**self._at)
            except self._client.exceptions.ClientError as error:
                if _status(error) == 404:
                    return None
                raise
            return found["ETag"] if found["Metadata"].get(_WRITER) == writer else None

        return self._spoken(call)

    def look(self) -> Seen | None:
        """The object; None where it is absent."""

        def call() -> Seen | None:
            try:
                found = self._client.get_object(**self._at)
            except self._client.exceptions.NoSuchKey:
                return None
            data, now = found["Body"].read(), found["ResponseMetadata"]["HTTPHeaders"].get("date")
            age = None if now is None else (parsedate_to_datetime(now) - found["LastModified"]).total_seconds()
            return Seen(data, found["ETag"], age)

        return self._spoken(call)

    def _spoken(self, call: Callable[[], T]) -> T:
        from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError

        try:
            return call()
        except (NoCredentialsError, PartialCredentialsError) as error:
            raise UserError(f"storage {self._address}: {one_line(error)}; check the AWS_ variables") from None
        except ClientError as error:
            code = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", _code(error)).upper()
            raise OSError(f"AWS Error {code} (HTTP status {_status(error)})") from None
        except BotoCoreError as error:
            raise OSError(one_line(error)) from None


def new_writer() -> str:
    return uuid.uuid4().hex


def _status(error: Any) -> int:
    return int(error.response["ResponseMetadata"]["HTTPStatusCode"])


def _code(error: Any) -> str:
    return str(error.response["Error"].get("Code", "UNKNOWN"))


@lru_cache(maxsize=8)
def _client(endpoint: Endpoint, connect_seconds: float, stall_seconds: float) -> Any:
    try:
        import botocore.session
        from botocore.config import Config
    except ImportError:
        raise UserError(
            "storage: a store on S3 needs Amazon's client beside pyarrow: pip install 'ddpm-pipelines[s3]'"
        ) from None
    config = Config(
        connect_timeout=connect_seconds,
        read_timeout=stall_seconds,
        retries={"total_max_attempts": 1},
        s3={"addressing_style": "path" if endpoint.url else "auto"},
        # Servers other than Amazon's do not know its newer checksums.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    return botocore.session.Session().create_client(
        "s3", region_name=endpoint.region, endpoint_url=endpoint.url, verify=endpoint.authorities, config=config
    )

"""Buckets: what the environment says about S3 and Google Cloud Storage, and what their errors mean.

Nothing here knows what a store holds. TensorStore speaks both protocols and finds credentials; this
module gives it the endpoint and region that other clients of a bucket read from the same variables,
and turns its exceptions into errors that say what to do.
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import tensorstore as ts

from schemas.errors import (
    ConfigError,
    CorruptStoreError,
    RetortError,
    StorageError,
    StoreNotFoundError,
)

DRIVERS = {"s3://": "s3", "gs://": "gcs"}

# Key-value stores of one context share a driver, and so its credentials, while one is open.
CONTEXT = ts.Context()

_GCS_URL = "TENSORSTORE_GCS_HTTP_URL"
_GCS_TOKEN = "GOOGLE_AUTH_TOKEN_FOR_TESTING"

# TensorStore tries 32 times, for a quarter of an hour. That is right in the middle of a long run
# and wrong for a mistyped endpoint, so the first request of a process to a store tries less.
_FIRST_RETRIES = {"max_retries": 3}
_FIRST_SECONDS = 60.0

_answered: dict[str, Any] = {}

# How the messages of TensorStore begin where the cause is not the stored bytes.
_REFUSED = ("PERMISSION_DENIED", "UNAUTHENTICATED", "INTERNAL: Failed to get credentials")
_UNREACHED = ("UNAVAILABLE", "ABORTED", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "CURL error")


def bucket_spec(url: str, path: str) -> dict[str, Any] | None:
    """TensorStore's spec for `path` under a bucket's URL, or None if the URL names no bucket."""
    scheme = next((scheme for scheme in DRIVERS if url.startswith(scheme)), None)
    if scheme is None:
        return None
    bucket, _, prefix = url.removeprefix(scheme).partition("/")
    if not bucket:
        raise ConfigError(
            f"A store in the cloud must be {scheme}bucket/path, but it is {url}; name the bucket."
        )
    prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
    fields = _s3_fields() if DRIVERS[scheme] == "s3" else _gcs_fields()
    return {"driver": DRIVERS[scheme], "bucket": bucket, "path": prefix + path, **fields}


def _variable(*names: str) -> tuple[str, str]:
    """The first of the variables that is set and not empty, and its value."""
    for name in names:
        if os.environ.get(name):
            return name, os.environ[name]
    return "", ""


def _s3_fields() -> dict[str, Any]:
    # Left to itself, TensorStore judges by the server whether a PUT may be conditional.
    fields: dict[str, Any] = {"use_conditional_write": True}
    name, endpoint = _variable("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
    _, region = _variable("AWS_REGION", "AWS_DEFAULT_REGION")
    if endpoint:
        if not endpoint.startswith(("http://", "https://")):
            raise ConfigError(
                f"{name} must begin with http:// or https://, but it is {endpoint}; correct it."
            )
        fields["endpoint"] = endpoint.rstrip("/")
        # TensorStore would ask the server for the region. In version 0.1.86 a listing that fails
        # while it asks keeps its place in the queue of requests, and later ones wait for ever.
        region = region or "us-east-1"
    if region:
        fields["aws_region"] = region
    keys = {name for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY") if _variable(name)[0]}
    if len(keys) == 1:
        raise ConfigError(
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY must be set together, but only "
            f"{keys.pop()} is; set the other."
        )
    if keys:
        # The default chain would find them too, but first prints errors if there is no ~/.aws.
        fields["aws_credentials"] = {"type": "environment"}
    return fields


def _gcs_fields() -> dict[str, Any]:
    _, host = _variable("STORAGE_EMULATOR_HOST")
    if host:
        # The driver has no field for an endpoint, only a variable that it reads at each open.
        url = host if "://" in host else f"http://{host}"
        # Only if it is another: the C library does not guard the environment between threads.
        if os.environ.get(_GCS_URL) != url:
            os.environ[_GCS_URL] = url
        # An emulator needs no credentials, and real ones are none of its business.
        if _GCS_TOKEN not in os.environ:
            os.environ[_GCS_TOKEN] = "emulator"
    return {}


def first_contact(url: str, spec: dict[str, Any], manifest_key: str) -> None:
    """Until a store's manifest was found: see that its bucket is there, answers and may be listed.

    `spec` is that of the store's URL. Raises StoreNotFoundError, StorageError or ConfigError.
    """
    known = json.dumps([spec, os.environ.get(_GCS_URL)], sort_keys=True)
    if known in _answered:
        return
    retries = {f"{spec['driver']}_request_retries": _FIRST_RETRIES}
    with explained(url):
        store = ts.KvStore.open(spec | retries, context=CONTEXT).result()
        found = store.read(manifest_key).result(timeout=_FIRST_SECONDS)
        # To a read, a missing bucket and a missing object are the same; to a listing of S3, not.
        # The gcs driver in turn takes every refused listing for an empty one.
        keys = ts.KvStore.KeyRange(manifest_key, manifest_key + "0")
        listed = store.list(range=keys).result(timeout=_FIRST_SECONDS)
    if found.state == "value":
        if not listed:
            raise StorageError(
                f"A store's bucket must let you list, read and write, but {url} can be read and "
                "not listed; ask for the permission to list its objects."
            )
        # Kept open, or every later open would look for credentials again.
        _answered[known] = ts.KvStore.open(spec, context=CONTEXT).result()


def place(store: Any) -> str:
    """The URL of a key-value store; TensorStore gives none where there is an endpoint."""
    spec = store.spec().to_json()
    scheme = next((scheme for scheme, driver in DRIVERS.items() if driver == spec["driver"]), "")
    return f"{scheme}{spec['bucket']}/{spec['path']}" if scheme else spec["path"]


@contextmanager
def explained(where: Any) -> Iterator[None]:
    """Turn what TensorStore raises about a URL or a key-value store into a RetortError."""
    try:
        yield
    except RetortError:
        raise
    except (ValueError, OSError, NotImplementedError) as error:
        url = where if isinstance(where, str) else place(where)
        raise _explanation(url, error) from error


def raise_if_unanswered(url: str, error: Exception) -> None:
    """Raise StorageError if `error`, of an array, says nothing about the stored bytes."""
    if isinstance(error, TimeoutError) or str(error).startswith(_REFUSED + _UNREACHED):
        raise _explanation(url, error) from error


def _explanation(url: str, error: Exception) -> RetortError:
    text = str(error)
    said = re.split(r" \[[\w-]+='|\n", text)[0] or type(error).__name__
    if text.startswith("DATA_LOSS"):
        return CorruptStoreError(
            f"Stored bytes must match their checksums, but in {url} some do not ({said}); delete "
            "the file and run again."
        )
    scheme, _, rest = url.partition("://")
    if not url.startswith(tuple(DRIVERS)):
        return StorageError(
            f"A store's folder must be readable and writable, but at {url} it is not ({said}); "
            "check the path, its permissions and the free space."
        )
    bucket = f"{scheme}://{rest.partition('/')[0]}"
    if "bucket name" in text:
        return ConfigError(
            f"A bucket's name must be valid, but that of {url} is not ({said}); correct the URL."
        )
    if text.startswith("NOT_FOUND"):
        return StoreNotFoundError(
            f"A store's bucket must exist, but {_server(scheme)} has no {bucket}; create it or "
            f"correct {url}."
        )
    if text.startswith(_REFUSED):
        return StorageError(
            f"A store's bucket must let you list, read and write, but {_server(scheme)} refuses "
            f"access to {bucket} ({said}); check {_credentials(scheme)} and the bucket's policy."
        )
    if isinstance(error, TimeoutError) or text.startswith(_UNREACHED):
        return StorageError(
            f"A store's server must answer, but for {bucket} {_server(scheme)} does not ({said}); "
            "check the network and the endpoint."
        )
    return StorageError(
        f"A store's bucket must take a store's requests, but for {bucket} {_server(scheme)} "
        f"answers: {said}; check the endpoint{' and AWS_REGION' if scheme == 's3' else ''}."
    )


def _server(scheme: str) -> str:
    """The server's name, with the variable that chose it."""
    if scheme == "s3":
        name, value = _variable("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
        return f"{value} ({name})" if name else "Amazon S3"
    name, value = _variable("STORAGE_EMULATOR_HOST", _GCS_URL)
    return f"{value} ({name})" if name else "Google Cloud Storage"


def _credentials(scheme: str) -> str:
    if scheme == "s3":
        if _variable("AWS_ACCESS_KEY_ID")[0]:
            return "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        return (
            "the credentials (AWS_ACCESS_KEY_ID is not set; a profile or a role, if any, is used)"
        )
    return "the credentials (GOOGLE_APPLICATION_CREDENTIALS, or those of gcloud or the machine)"

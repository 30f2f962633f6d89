"""Reading and writing whole objects, atomically, in S3 or in a directory.

An object appears whole or not at all: S3 gives that by itself, a directory by writing to ``.parts`` in it and renaming; what a
killed writer left there goes with a later write. A conditional write (``only_if_absent``) is S3's ``If-None-Match: *``; in a
directory a hard link, which fails where the name exists.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlencode, urlsplit

import polars as pl


class LakeError(Exception):
    """The lake cannot do what was asked; the message names the address."""


class KeyMissingError(LakeError):
    """Nothing is stored under this key."""


class UnreadableError(LakeError):
    """What is stored under this key is not what it should be; reading it again gives the same."""


class KeyExistsError(LakeError):
    """A conditional write met an object that is there already."""


class _Backend(Protocol):
    at_once: int
    """Reads worth having under way at the same time: many where each waits for the network."""

    def read(self, key: str) -> bytes: ...
    def write(self, key: str, data: bytes, only_if_absent: bool, tags: Mapping[str, str]) -> None: ...
    def exists(self, key: str) -> bool: ...
    def keys(self, prefix: str) -> list[str]: ...
    def tags(self, key: str) -> dict[str, str]: ...


class Lake:
    """One lake, addressed by keys of ``crpbot_lib.lake.keys``.

    ``url`` is ``s3://bucket[/prefix]`` (endpoint and credentials as the AWS SDKs read them) or ``file:///directory``.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self.root = url.rstrip("/")
        self._backend: _Backend
        if parts.scheme == "file" and not parts.netloc and parts.path.startswith("/"):
            self._backend = _Directory(Path(unquote(parts.path)))
        elif parts.scheme == "s3" and parts.netloc:
            self._backend = _Bucket(parts.netloc, parts.path.strip("/"))
        else:
            raise LakeError(f"CRPBOT_LAKE={url!r} is no address of a lake: expected s3://bucket/prefix or file:///directory")

    def url(self, key: str) -> str:
        """The full address of ``key``, for logs and XCom."""
        return f"{self.root}/{key}"

    def exists(self, key: str) -> bool:
        return self._backend.exists(key)

    def keys(self, prefix: str) -> list[str]:
        """All keys that begin with ``prefix``, sorted."""
        return sorted(self._backend.keys(prefix))

    def read(self, key: str) -> bytes:
        """The object's bytes; KeyMissingError when there is none."""
        try:
            return self._backend.read(key)
        except KeyMissingError:
            raise KeyMissingError(f"{self.url(key)} does not exist") from None

    def sha256(self, key: str) -> str:
        """Of the object's bytes, in hex; KeyMissingError when there is none."""
        return hashlib.sha256(self.read(key)).hexdigest()

    def read_each(self, keys: Sequence[str]) -> list[bytes | None]:
        """The objects' bytes in the order of ``keys``, None where there is none."""

        def read(key: str) -> bytes | None:
            try:
                return self._backend.read(key)
            except KeyMissingError:
                return None

        if self._backend.at_once == 1:
            return [read(key) for key in keys]
        with ThreadPoolExecutor(self._backend.at_once) as pool:
            return list(pool.map(read, keys))

    def write(self, key: str, data: bytes, *, only_if_absent: bool = False, tags: Mapping[str, str] | None = None) -> None:
        """Stores ``data`` whole. ``only_if_absent``: KeyExistsError, and nothing changed, where an object is there already.
        ``tags`` become S3 object tags (a ``.tags.json`` beside the file in a directory)."""
        try:
            self._backend.write(key, data, only_if_absent, tags or {})
        except KeyExistsError:
            raise KeyExistsError(f"{self.url(key)} exists already") from None

    def tags(self, key: str) -> dict[str, str]:
        """The object's tags; KeyMissingError when there is no object."""
        try:
            return self._backend.tags(key)
        except KeyMissingError:
            raise KeyMissingError(f"{self.url(key)} does not exist") from None

    def read_json(self, key: str) -> Any:
        data = self.read(key)
        try:
            return json.loads(data)
        except ValueError as error:
            raise UnreadableError(
                f"{self.url(key)} is not JSON ({error}); restore it or delete it and run the step again"
            ) from error

    def write_json(self, key: str, value: Any, *, only_if_absent: bool = False, tags: Mapping[str, str] | None = None) -> None:
        """``value`` as JSON with sorted keys: equal values give equal bytes."""
        text = json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n"
        self.write(key, text.encode(), only_if_absent=only_if_absent, tags=tags)

    def read_frame(self, key: str) -> pl.DataFrame:
        data = self.read(key)
        try:
            return pl.read_parquet(io.BytesIO(data))
        except pl.exceptions.PolarsError as error:
            raise UnreadableError(
                f"{self.url(key)} is not a readable parquet file ({error}); delete it and fetch it again"
            ) from error

    def write_frame(self, key: str, frame: pl.DataFrame) -> None:
        """``frame`` as parquet (zstd, level 1). Equal frames give equal bytes under one version of polars."""
        buffer = io.BytesIO()
        frame.write_parquet(buffer, compression="zstd", compression_level=1, statistics=True)
        self.write(key, buffer.getvalue())


PARTS = ".parts"
"""Where a directory's writes begin; no key."""
ABANDONED_SECONDS = 3600.0
"""After so long a write was killed."""


class _Directory:
    """A key never leads out of the directory by its name; a link that somebody puts into it is theirs, and is followed."""

    at_once = 1

    def __init__(self, root: Path) -> None:
        self.root = Path(os.path.abspath(root))

    def _path(self, key: str) -> Path:
        # by its name alone: asking the file system about every folder on the way costs more than reading a partition
        path = Path(os.path.normpath(self.root / key))
        if not path.is_relative_to(self.root):
            raise LakeError(f"the key {key!r} leads out of {self.root}")
        return path

    def read(self, key: str) -> bytes:
        try:
            return self._path(key).read_bytes()
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise KeyMissingError(key) from None

    def write(self, key: str, data: bytes, only_if_absent: bool, tags: Mapping[str, str]) -> None:
        path = self._path(key)
        part = self.root / PARTS / f"{uuid.uuid4().hex}.part"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part.parent.mkdir(exist_ok=True)
            with part.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if only_if_absent:
                os.link(part, path)
            else:
                part.replace(path)
        except OSError as error:
            if isinstance(error, FileExistsError) and path.is_file():
                raise KeyExistsError(key) from None
            raise LakeError(f"{path} cannot be written: {error}; is the disk full, or may this user not write there?") from error
        finally:
            part.unlink(missing_ok=True)
        self._sweep(part.parent)
        tags_key = f"{key}.tags.json"
        if tags:
            self.write(tags_key, json.dumps(dict(tags), sort_keys=True).encode(), False, {})
        elif not key.endswith(".tags.json"):
            # an object written without tags has none, as in S3, and does not inherit those of the one before it
            self._path(tags_key).unlink(missing_ok=True)

    @staticmethod
    def _sweep(parts: Path) -> None:
        for part in parts.iterdir():
            # another writer may end, or sweep, at the same time
            with suppress(OSError):
                if time.time() - part.stat().st_mtime > ABANDONED_SECONDS:
                    part.unlink()

    def exists(self, key: str) -> bool:
        return self._path(key).is_file()

    def keys(self, prefix: str) -> list[str]:
        base = self._path(prefix.rpartition("/")[0])
        found = (p.relative_to(self.root).as_posix() for p in base.rglob("*") if p.is_file())
        return [k for k in found if k.startswith(prefix) and not k.startswith(f"{PARTS}/") and not k.endswith(".tags.json")]

    def tags(self, key: str) -> dict[str, str]:
        if not self.exists(key):
            raise KeyMissingError(key)
        try:
            return dict(json.loads(self.read(f"{key}.tags.json")))
        except KeyMissingError:
            return {}


class _Bucket:
    at_once = 8

    def __init__(self, bucket: str, prefix: str) -> None:
        import boto3
        from botocore.config import Config

        self.bucket, self.prefix = bucket, f"{prefix}/" if prefix else ""
        # boto3.client shares one default session, which is not safe to create from two threads at once
        self.client = boto3.session.Session().client(
            "s3", config=Config(retries={"mode": "standard", "max_attempts": 6}, connect_timeout=10, read_timeout=60)
        )

    def read(self, key: str) -> bytes:
        with self._answered(key):
            answer = self.client.get_object(Bucket=self.bucket, Key=self.prefix + key)
            self._require(answer, "ContentLength", key)
            return answer["Body"].read()

    def write(self, key: str, data: bytes, only_if_absent: bool, tags: Mapping[str, str]) -> None:
        options: dict[str, Any] = {"IfNoneMatch": "*"} if only_if_absent else {}
        if tags:
            options["Tagging"] = urlencode(dict(tags))
        with self._answered(key):
            self.client.put_object(Bucket=self.bucket, Key=self.prefix + key, Body=data, **options)

    def exists(self, key: str) -> bool:
        try:
            with self._answered(key):
                self.client.head_object(Bucket=self.bucket, Key=self.prefix + key)
        except KeyMissingError:
            return False
        return True

    def keys(self, prefix: str) -> list[str]:
        with self._answered(prefix):
            found: list[str] = []
            for page in self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self.prefix + prefix):
                self._require(page, "KeyCount", prefix)
                found += [item["Key"][len(self.prefix) :] for item in page.get("Contents", [])]
            return found

    def tags(self, key: str) -> dict[str, str]:
        with self._answered(key):
            tag_set = self.client.get_object_tagging(Bucket=self.bucket, Key=self.prefix + key)["TagSet"]
        return {tag["Key"]: tag["Value"] for tag in tag_set}

    def _require(self, answer: Mapping[str, Any], field: str, key: str) -> None:
        """An answer that ended in its headers reads as one without content: no keys, no bytes. A whole one has ``field``."""
        if field not in answer:
            raise LakeError(f"s3://{self.bucket}/{self.prefix}{key}: S3's answer was cut, it has no {field}; try again")

    @contextmanager
    def _answered(self, key: str) -> Iterator[None]:
        """Turns what S3 refuses into the lake's errors; an absent bucket or denied access is not an absent object."""
        from botocore.exceptions import BotoCoreError, ClientError
        from botocore.parsers import ResponseParserError

        try:
            yield
        except (BotoCoreError, ClientError, ResponseParserError) as error:
            code = error.response["Error"]["Code"] if isinstance(error, ClientError) else ""
            # HEAD has no body to tell an absent object from an absent bucket: both are a bare 404
            if code in ("NoSuchKey", "404", "NotFound"):
                raise KeyMissingError(key) from None
            if code in ("PreconditionFailed", "ConditionalRequestConflict"):
                raise KeyExistsError(key) from None
            raise LakeError(
                f"s3://{self.bucket}/{self.prefix}{key}: {error}; check CRPBOT_LAKE, AWS_ENDPOINT_URL and the credentials"
            ) from error

"""API keys from configuration and a file, and their quotas in this replica."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import yaml

from timeviper_platform.common.config import parse_config
from timeviper_platform.common.storage import read_bytes, shown_uri
from timeviper_platform.serving.gateway.config import ApiKey, CurrentConfig, KeyFile
from timeviper_platform.serving.gateway.openai_protocol import ApiError

logger = logging.getLogger(__name__)

REFRESH_S = 5.0
"""Seconds between two readings of the file of keys."""
MINUTE_S = 60.0


class KeyRing:
    """The accepted keys. They may change while the server runs."""

    def __init__(self, current: CurrentConfig) -> None:
        """Raises ValueError for a file that is not a list of keys, OSError for one that cannot be read."""
        self._current = current
        self._uri = current.config.api_keys_file
        self._content = b"" if self._uri is None else read_bytes(self._uri)
        self._of_file = () if self._uri is None else self._parsed(self._content)
        self._due = time.monotonic() + REFRESH_S

    def find(self, key: str) -> ApiKey | None:
        digest = hashlib.sha256(key.encode()).hexdigest()
        # compares every key in constant time, so that timing reveals nothing
        matches = [entry for entry in self._keys if hmac.compare_digest(entry.sha256, digest)]
        return matches[0] if matches else None

    def of_hash(self, sha256: str | None) -> ApiKey | None:
        return next((entry for entry in self._keys if entry.sha256 == sha256), None)

    @property
    def _keys(self) -> tuple[ApiKey, ...]:
        return (*self._current.config.api_keys, *self._of_file)

    async def refresh(self) -> None:
        """Reads the file again when it is due. Keeps the keys if it cannot be read or is invalid."""
        if self._uri is None or time.monotonic() < self._due:
            return
        self._due = time.monotonic() + REFRESH_S
        try:
            content = await asyncio.to_thread(read_bytes, self._uri)
            if content != self._content:
                self._of_file, self._content = self._parsed(content), content
                logger.info("%s: %d keys", shown_uri(self._uri), len(self._of_file))
        except (OSError, ValueError) as error:
            logger.error("%s: the API keys stay as they are: %s", shown_uri(self._uri), type(error).__name__)

    def _parsed(self, content: bytes) -> tuple[ApiKey, ...]:
        source = shown_uri(self._uri or "")
        try:
            values = yaml.safe_load(content.decode())
        except (yaml.YAMLError, UnicodeDecodeError):
            raise ValueError(f"{source} is not valid YAML; write `keys:` and a list of tenant and sha256") from None
        if not isinstance(values, dict):
            raise ValueError(f"{source} must hold `keys:` and a list of tenant and sha256")
        return parse_config(KeyFile, values, source=source).keys


@dataclass(slots=True)
class _Bucket:
    """Token bucket that refills in a minute."""

    size: int
    level: float
    at: float

    def fill(self) -> None:
        now = time.monotonic()
        self.level = min(self.size, self.level + (now - self.at) * self.size / MINUTE_S)
        self.at = now

    def wait_s(self, tokens: float) -> float:
        """Seconds until it has this many tokens."""
        return max(0.0, (tokens - self.level) * MINUTE_S / self.size)


class Quotas:
    """Use of each key in this replica; other replicas count separately."""

    def __init__(self) -> None:
        self._ongoing: dict[str, int] = {}
        self._buckets: dict[tuple[str, str], _Bucket] = {}

    @contextmanager
    def request(self, key: ApiKey | None) -> Iterator[None]:
        """Counts a request while it runs.

        Raises:
            ApiError: 429 when the key has too many requests at once or in the last minute.
        """
        if key is None:
            yield
            return
        quota, ongoing = key.quota, self._ongoing.get(key.sha256, 0)
        if quota.max_concurrent_requests is not None and ongoing >= quota.max_concurrent_requests:
            raise _exceeded(f"{quota.max_concurrent_requests} requests at once", 1.0)
        if requests := self._bucket(key, "requests", quota.requests_per_minute):
            if requests.level < 1:
                raise _exceeded(f"{quota.requests_per_minute} requests per minute", requests.wait_s(1))
            requests.level -= 1
        self._ongoing[key.sha256] = ongoing + 1
        try:
            yield
        finally:
            self._ongoing[key.sha256] -= 1

    def require_frames(self, key: ApiKey | None) -> None:
        """Raises ApiError 429 when the key has no frames left."""
        if key is None:
            return
        per_minute = key.quota.frames_per_minute
        if (frames := self._bucket(key, "frames", per_minute)) and frames.level <= 0:
            raise _exceeded(f"{per_minute} frames per minute", frames.wait_s(1))

    def add_frames(self, key: ApiKey | None, num_frames: int) -> None:
        """Charges a request's frames. The last request may exceed what is left; later ones wait for it."""
        if key is not None and (bucket := self._bucket(key, "frames", key.quota.frames_per_minute)):
            bucket.level -= num_frames

    def _bucket(self, key: ApiKey, kind: str, per_minute: int | None) -> _Bucket | None:
        if per_minute is None:
            return None
        bucket = self._buckets.get((key.sha256, kind))
        if bucket is None or bucket.size != per_minute:  # a new quota applies at once
            bucket = self._buckets[key.sha256, kind] = _Bucket(per_minute, per_minute, time.monotonic())
        bucket.fill()
        return bucket


def _exceeded(quota: str, retry_after_s: float) -> ApiError:
    return ApiError(
        429, f"this key may have {quota}, try again later", code="rate_limit_exceeded", retry_after_s=retry_after_s
    )

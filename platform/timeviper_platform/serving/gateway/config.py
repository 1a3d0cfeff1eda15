"""API keys and request limits of the gateway."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class ApiKey:
    tenant: str
    """Owner of files and caches. Several keys may share a tenant."""
    sha256: str
    """SHA-256 of the key in hex. Generate both: `openssl rand -hex 32 | tee key | tr -d '\\n' | sha256sum`."""

    def __post_init__(self) -> None:
        if re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,63}", self.tenant) is None:
            raise ValueError(f"{self.tenant = } names a folder: use lower-case letters, digits, - and _")
        if re.fullmatch(r"[0-9a-f]{64}", self.sha256) is None:
            raise ValueError(f"the sha256 of the key of tenant {self.tenant!r} must be 64 hexadecimal digits")


@dataclass(frozen=True, kw_only=True, slots=True)
class GatewayConfig:
    model_name: str = "timeviper"
    """Model name in requests."""
    media_root: str = "outputs/serving/media"
    """Folder or URI of uploads, reachable by all replicas of the gateway and the feature service."""
    api_keys: tuple[ApiKey, ...] = ()
    """Accepted API keys; empty = requests need no key."""
    max_request_bytes: int = 16 * 2**20
    """Maximum bytes of a chat request, data: URIs included."""
    max_upload_bytes: int = 512 * 2**20
    """Maximum bytes of an upload."""
    max_media_per_request: int = 8
    """Maximum videos and pictures per request."""
    max_text_characters: int = 100_000
    """Maximum characters per request, over all messages."""
    default_max_tokens: int = 256
    """Maximum tokens per answer where a request sets none."""
    max_tokens: int = 1024
    """Maximum tokens per answer. Must be <= engine.max_new_tokens."""
    default_temperature: float = 1.0
    """Temperature where a request sets none; OpenAI's is 1."""
    request_timeout_s: float = 300.0
    """Maximum seconds from a request's last byte to its answer's last byte."""

    def __post_init__(self) -> None:
        if not 1 <= self.default_max_tokens <= self.max_tokens:
            raise ValueError(f"{self.default_max_tokens = } must be between 1 and {self.max_tokens = }")
        if self.request_timeout_s <= 0:
            raise ValueError(f"{self.request_timeout_s = } must be above 0")

"""The gateway's configuration: what clients may ask for, and whose keys are known. No HTTP, no services."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class ApiKey:
    """Who may ask."""

    tenant: str
    """whose files this key sees; several keys may share one"""
    sha256: str
    """hex digest of the key; the key itself is kept nowhere. Make one: `openssl rand -hex 32 | tee key | tr -d '\\n' |
    sha256sum`"""

    def __post_init__(self) -> None:
        if re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,63}", self.tenant) is None:
            raise ValueError(f"{self.tenant = } names a folder: lower-case letters, digits, - and _")
        if re.fullmatch(r"[0-9a-f]{64}", self.sha256) is None:
            raise ValueError(f"the sha256 of the key of tenant {self.tenant!r} must be 64 hexadecimal digits")


@dataclass(frozen=True, kw_only=True, slots=True)
class GatewayConfig:
    """What clients may ask for."""

    model_name: str = "timeviper"
    """the `model` that requests must name"""
    media_root: str = "outputs/serving/media"
    """folder or URI for uploads; every replica of gateway and feature service must reach it"""
    api_keys: tuple[ApiKey, ...] = ()
    """none = no key needed"""
    max_request_bytes: int = 16 * 2**20
    """body of a chat request, data: URIs included"""
    max_upload_bytes: int = 512 * 2**20
    """body of an upload"""
    max_media_per_request: int = 8
    max_text_characters: int = 100_000
    """of all messages together"""
    default_max_tokens: int = 256
    max_tokens: int = 1024
    """the most one answer may be asked to have; not above the engine's max_new_tokens"""
    default_temperature: float = 1.0
    """when a request names none; OpenAI's is 1"""
    request_timeout_s: float = 300.0
    """from the last byte of a request to the last of its answer"""

    def __post_init__(self) -> None:
        if not 1 <= self.default_max_tokens <= self.max_tokens:
            raise ValueError(f"{self.default_max_tokens = } must be between 1 and {self.max_tokens = }")
        if self.request_timeout_s <= 0:
            raise ValueError(f"{self.request_timeout_s = } must be above 0")

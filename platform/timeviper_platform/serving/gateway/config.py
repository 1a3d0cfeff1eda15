"""API keys and request limits of the gateway."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from timeviper_platform.data.media.http_file import is_host

HAPROXY_VARIABLE = "RAY_SERVE_ENABLE_HA_PROXY"
"""Set to 1 where Ray Serve runs HAProxy in front of the gateways."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Quota:
    """Limits of one key; None = unlimited. Each gateway replica counts separately, except bytes."""

    requests_per_minute: int | None = None
    """Maximum requests per minute."""
    frames_per_minute: int | None = None
    """Maximum frames of videos and pictures per minute, stored ones included."""
    max_concurrent_requests: int | None = None
    """Maximum requests at once."""
    max_stored_bytes: int | None = None
    """Maximum bytes of the tenant's uploads."""

    def __post_init__(self) -> None:
        for name in ("requests_per_minute", "frames_per_minute", "max_concurrent_requests", "max_stored_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} = {value} must be at least 1; null is unlimited")


@dataclass(frozen=True, kw_only=True, slots=True)
class ApiKey:
    tenant: str
    """Owner of files and caches. Several keys may share a tenant."""
    sha256: str
    """SHA-256 of the key in hex. Generate both: `openssl rand -hex 32 | tee key | tr -d '\\n' | sha256sum`."""
    quota: Quota = field(default_factory=Quota)

    def __post_init__(self) -> None:
        if re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,63}", self.tenant) is None:
            raise ValueError(f"{self.tenant = } names a folder: use lower-case letters, digits, - and _")
        if re.fullmatch(r"[0-9a-f]{64}", self.sha256) is None:
            raise ValueError(f"the sha256 of the key of tenant {self.tenant!r} must be 64 hexadecimal digits")


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyFile:
    """Content of `gateway.api_keys_file`."""

    keys: tuple[ApiKey, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Retention:
    """Which uploads are deleted. None = none for this reason."""

    max_age_days: float | None = 30.0
    """Days after which an upload, or a job that has ended, is deleted."""
    max_bytes: int | None = 100 * 2**30
    """Maximum bytes of all uploads; the oldest are deleted first."""
    interval_s: float = 600.0
    """Seconds between two scans of the folder."""

    def __post_init__(self) -> None:
        for name in ("max_age_days", "max_bytes", "interval_s"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} = {value} must be above 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class RemoteMedia:
    """Downloads of https addresses that requests name."""

    allowed_domains: tuple[str, ...] = ()
    """Hosts to fetch from, with their subdomains; empty = no remote media."""
    max_bytes: int = 512 * 2**20
    """Maximum bytes of a download."""
    timeout_s: float = 60.0
    """Maximum seconds of a download, redirects included."""
    keep_s: float = 3600.0
    """Seconds for which a download is reused for the same address."""

    def __post_init__(self) -> None:
        if wrong := [domain for domain in self.allowed_domains if not is_host(domain) or domain != domain.lower()]:
            raise ValueError(
                f"remote.allowed_domains: {wrong} must be lower-case host names such as videos.example.org"
            )
        if self.max_bytes < 1 or self.timeout_s <= 0 or self.keep_s < 0:
            raise ValueError(
                f"{self.max_bytes = } and {self.timeout_s = } must be above 0, {self.keep_s = } at least 0"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ConnectionLimits:
    """Limits of the HTTP servers of Ray Serve, before a request reaches a gateway. See `connections`."""

    header_timeout_s: float = 10.0
    """Seconds in which a request's headers must arrive."""
    max_header_bytes: int = 64 * 2**10
    """Maximum bytes of a request's headers."""
    write_timeout_s: float = 60.0
    """Seconds that a client may leave an answer unread."""
    max_per_client: int = 512
    """Maximum connections per client address. One more closes the client's oldest stalled one, or is answered 429."""

    def __post_init__(self) -> None:
        for name in ("header_timeout_s", "max_header_bytes", "write_timeout_s", "max_per_client"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} = {getattr(self, name)} must be above 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class GatewayConfig:
    model_name: str = "timeviper"
    """Model name in requests."""
    media_root: str = "outputs/serving/media"
    """Folder or URI of uploads, reachable by all replicas of the gateway and the feature service."""
    api_keys: tuple[ApiKey, ...] = ()
    """Accepted API keys. Without keys, only clients on this machine are answered."""
    api_keys_file: str | None = None
    """YAML file or URI with further keys, `keys: [{tenant: ..., sha256: ...}]`. Changes take effect within seconds."""
    allow_anonymous: bool = False
    """Answer clients on other machines without keys. Anyone who reaches the port can then use the model."""
    allowed_hosts: tuple[str, ...] = ()
    """Further names of this server that `Host` may contain when there are no keys. This machine's names always may."""
    cors_origins: tuple[str, ...] = ()
    """Origins of web pages that may call the API, such as https://app.example.com."""
    max_request_bytes: int = 16 * 2**20
    """Maximum bytes of a chat request, data: URIs included."""
    max_upload_bytes: int = 512 * 2**20
    """Maximum bytes of an upload."""
    max_media_per_request: int = 8
    """Maximum videos and pictures per request. Consecutive pictures of a message are the frames of one video."""
    max_parts_per_request: int = 2048
    """Maximum content parts per request, over all messages."""
    max_running_jobs: int = 2
    """Maximum jobs that a gateway replica runs at once."""
    max_unfinished_jobs: int = 100
    """Maximum unfinished jobs of a tenant."""
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
    body_grace_s: float = 10.0
    """Seconds that any body may take to arrive."""
    min_body_bytes_per_s: int = 16 * 2**10
    """Minimum rate of a body after `body_grace_s`; slower ones are answered with 408."""
    allowed_local_media: tuple[str, ...] = ()
    """Folders whose files requests may name by file:// addresses; gateways and feature services must see them."""
    remote: RemoteMedia = field(default_factory=RemoteMedia)
    connections: ConnectionLimits = field(default_factory=ConnectionLimits)
    retention: Retention = field(default_factory=Retention)

    def __post_init__(self) -> None:
        if not 1 <= self.default_max_tokens <= self.max_tokens:
            raise ValueError(f"{self.default_max_tokens = } must be between 1 and {self.max_tokens = }")
        for name in (
            "request_timeout_s",
            "body_grace_s",
            "min_body_bytes_per_s",
            "max_parts_per_request",
            "max_running_jobs",
            "max_unfinished_jobs",
        ):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} = {getattr(self, name)} must be above 0")

    @property
    def requires_keys(self) -> bool:
        return bool(self.api_keys) or self.api_keys_file is not None

    def require_keys(self, where: str) -> None:
        """Raises ValueError when the server would answer anyone `where` it listens."""
        if not (self.requires_keys or self.allow_anonymous):
            raise ValueError(
                f"gateway: no API keys are configured {where}; set gateway.api_keys or"
                " gateway.api_keys_file, or gateway.allow_anonymous: true to answer anyone"
            )


@dataclass(slots=True)
class CurrentConfig:
    """The gateway's configuration, in which limits and keys may change while it runs."""

    config: GatewayConfig

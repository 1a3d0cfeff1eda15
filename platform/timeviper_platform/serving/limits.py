"""Limits that change while replicas run: Ray Serve's `user_config` of a deployment, applied over its configuration."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, Literal, TypeVar, cast

from timeviper_platform.common.config import parse_config

logger = logging.getLogger(__name__)
T = TypeVar("T")

DeploymentName = Literal["gateway", "features", "engine"]
IN_PLACE: dict[DeploymentName, tuple[str, ...]] = {
    "gateway": (
        "api_keys",
        "max_request_bytes",
        "max_upload_bytes",
        "max_media_per_request",
        "max_parts_per_request",
        "max_unfinished_jobs",
        "max_text_characters",
        "default_max_tokens",
        "max_tokens",
        "default_temperature",
        "request_timeout_s",
        "body_grace_s",
        "min_body_bytes_per_s",
    ),
    "features": ("fps", "max_frames", "cache_bytes", "cache_max_age_s"),
    "engine": ("coalesce_ms", "engine.max_queued_requests"),
}
"""Keys of `user_config`. All others are read once, when a replica starts."""


class Limits(Generic[T]):
    """A replica's configuration."""

    def __init__(self, deployment: DeploymentName, config: T, check: Callable[[T], None] = lambda config: None) -> None:
        """Starts with the application's `args`. `check` raises ValueError for limits that do not fit the others."""
        self._deployment = deployment
        self._args = config
        self._check = check
        self._is_started = False
        self.config = config

    def reconfigure(self, user_config: Mapping[str, Any]) -> bool:
        """Applies `user_config` over the `args`, not over what was applied before; returns whether it is valid.

        Raises:
            ValueError: for an invalid one in a replica that is starting. A running one logs it and keeps its limits.
        """
        try:
            config = with_limits(self._args, user_config, self._deployment)
            self._check(config)
        except ValueError as error:
            if not self._is_started:
                raise
            logger.error("the limits of %s stay as they are: %s", self._deployment, error)
            return False
        self._is_started, self.config = True, config
        logger.info("limits of %s: %s", self._deployment, limits_text(config))
        return True


def with_limits(config: T, user_config: Mapping[str, Any], deployment: DeploymentName) -> T:
    """Returns the configuration with the keys of `user_config` replaced.

    Raises:
        ValueError: for a key that is not in IN_PLACE, or an invalid value.
    """
    allowed, source = IN_PLACE[deployment], f"user_config of {deployment}"
    for key in _leaves(user_config):
        if key not in allowed:
            raise ValueError(
                f"{source}: {key!r} cannot change while replicas run; set it in args, or use one of"
                f" {', '.join(allowed)}"
            )
    values = dataclasses.asdict(cast(Any, config))
    for key, value in user_config.items():
        is_section = isinstance(value, dict) and isinstance(values[key], dict)
        values[key] = {**values[key], **value} if is_section else value
    return parse_config(type(config), values, source=source)


def limits_text(config: object) -> str:
    """Returns all numbers of a configuration as `key = value, section.key = value`."""
    texts = []
    for entry in dataclasses.fields(config):  # type: ignore[arg-type]  # a dataclass
        value = getattr(config, entry.name)
        if dataclasses.is_dataclass(value):
            texts += [f"{entry.name}.{text}" for text in limits_text(value).split(", ") if text]
        elif isinstance(value, int | float) and not isinstance(value, bool):
            texts.append(f"{entry.name} = {value}")
        elif value is None and entry.name.startswith("max_"):
            texts.append(f"{entry.name} = none")
    return ", ".join(texts)


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"

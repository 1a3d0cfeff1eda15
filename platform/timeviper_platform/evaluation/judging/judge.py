"""An OpenAI-compatible endpoint as judge."""

from __future__ import annotations

import os
from dataclasses import dataclass

from timeviper_platform.evaluation.judging.exams import Call


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgeConfig:
    base_url: str
    """Endpoint with /v1, such as http://127.0.0.1:30000/v1."""
    model: str
    """Model of the endpoint. VDC's owners use Llama-3.1-8B-Instruct."""
    api_key_variable: str = "OPENAI_API_KEY"
    """Environment variable with the key; unset = no key."""
    max_tokens: int = 256
    """Maximum tokens per reply."""
    num_concurrent: int = 16
    """Maximum concurrent calls."""
    timeout_s: float = 120.0
    """Seconds per call."""
    max_retries: int = 2
    """Maximum retries of a failed call."""

    def __post_init__(self) -> None:
        if min(self.max_tokens, self.num_concurrent) < 1 or self.timeout_s <= 0 or self.max_retries < 0:
            raise ValueError(
                f"{self.max_tokens = } and {self.num_concurrent = } must be at least 1, {self.timeout_s = } above 0,"
                f" {self.max_retries = } at least 0"
            )


class Judge:
    """Asks without sampling, with a fixed seed. Thread-safe."""

    def __init__(self, config: JudgeConfig) -> None:
        import openai

        self._config = config
        self._client = openai.OpenAI(
            base_url=config.base_url,
            api_key=os.environ.get(config.api_key_variable) or "none",
            timeout=config.timeout_s,
            max_retries=config.max_retries,
        )

    def ask(self, call: Call) -> str:
        """Returns the reply.

        Raises:
            RuntimeError: if the endpoint fails, is not of OpenAI's API, or its reply is empty.
        """
        import openai
        from openai.types.chat import ChatCompletion

        try:
            completion = self._client.chat.completions.create(
                model=self._config.model,
                messages=[{"role": "system", "content": call.system}, {"role": "user", "content": call.user}],
                max_tokens=self._config.max_tokens,
                temperature=0,
                seed=0,
            )
        except openai.OpenAIError as error:
            raise RuntimeError(f"{type(error).__name__}: {error}"[:500]) from error
        if not isinstance(completion, ChatCompletion):  # the text of another page
            raise RuntimeError(
                f"{self._config.base_url} does not answer like OpenAI's API; judge.base_url mostly ends with /v1"
            )
        reply = completion.choices[0].message.content if completion.choices else None
        if not reply:
            raise RuntimeError("the reply is empty")
        return reply

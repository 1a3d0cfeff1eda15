"""Compiles clients' JSON schemas in processes with a deadline, before an engine does.

The intersection of a few patterns can take hours, and a thread that compiles cannot be stopped.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import subprocess
import sys
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

from timeviper_platform.serving.gateway.openai_protocol import ApiError

MAX_CPU_S = 1.0
"""CPU time to compile a schema, which an engine then spends too; useful ones take milliseconds."""
DEADLINE_S = 30.0
"""Start of the process included, 0.2 s on an idle machine."""
MAX_MEMORY_BYTES = 2 * 2**30
MAX_ACCEPTED = 1024
"""Accepted schemas that need no other check."""
MAX_AT_ONCE = 2
PASSED_ON = ("PATH", "LD_LIBRARY_PATH")
"""Environment variables that the process gets: none with credentials."""
_COMPILE = f"""
import resource, signal, sys
from llguidance import LLMatcher
resource.setrlimit(resource.RLIMIT_AS, ({MAX_MEMORY_BYTES}, {MAX_MEMORY_BYTES}))
signal.setitimer(signal.ITIMER_PROF, {MAX_CPU_S})  # its signal ends the process
try:
    print(LLMatcher.validate_grammar(LLMatcher.grammar_from_json_schema(sys.stdin.read())))
except ValueError as error:
    print(error)
"""
"""Prints why a schema is refused, or an empty line."""


class SchemaChecks:
    def __init__(self) -> None:
        self._accepted: OrderedDict[bytes, None] = OrderedDict()
        self._threads = ThreadPoolExecutor(max_workers=MAX_AT_ONCE, thread_name_prefix="schema")

    async def check(self, schema: str) -> None:
        """Raises ApiError 400 for a schema that is invalid, not supported, or too complex; 503 if there was no time."""
        digest = hashlib.sha256(schema.encode()).digest()
        if digest not in self._accepted:
            try:
                reason = await asyncio.get_running_loop().run_in_executor(self._threads, _reason_against, schema)
            except subprocess.TimeoutExpired:
                text = "the server is too busy to compile the JSON schema, try again"
                raise ApiError(503, text, code="unavailable", retry_after_s=2.0) from None
            if reason:
                raise ApiError(400, reason[:500], code="invalid_schema", param="response_format")
        self._accepted[digest] = None
        self._accepted.move_to_end(digest)
        if len(self._accepted) > MAX_ACCEPTED:
            self._accepted.popitem(last=False)


def _reason_against(schema: str) -> str:
    """Returns why a schema is refused; empty if it is not."""
    variables = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))  # as this process was set up by Ray
    child = subprocess.run(
        [sys.executable, "-c", _COMPILE],
        input=schema,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        env=variables,
        cwd="/",
    )
    if child.returncode == -signal.SIGPROF:
        return f"the JSON schema takes more than {MAX_CPU_S:g} s to compile; combine fewer patterns"
    if child.returncode != 0:
        return "the JSON schema takes too much memory to compile; combine fewer patterns"
    reason = child.stdout.strip()
    return f"the JSON schema is not supported: {reason}" if reason else ""

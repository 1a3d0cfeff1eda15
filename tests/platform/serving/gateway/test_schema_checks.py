"""schema_checks: what compiles in time is accepted once and for all, all else is a 400."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from reference.synthetic_gateway import Server, check_error
from timeviper_platform.serving.gateway import schema_checks


def answer_as(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


def intersection(count: int) -> dict[str, Any]:
    """12 patterns took 1.4 s, 14 took 17.5 s."""
    patterns = [f"(a|b)*a(a|b){{{number}}}" for number in range(3, 3 + count)]
    return answer_as({"allOf": [{"type": "string", "pattern": pattern} for pattern in patterns]})


def test_a_schema_that_would_compile_for_hours_is_refused_in_time(server: Server) -> None:
    """Before, it held the thread that makes all prompts of an engine replica, for every tenant."""
    began = time.monotonic()
    error = check_error(server.chat(response_format=intersection(20)), 400, "invalid_schema")
    assert time.monotonic() - began < 10
    assert (error["param"], "takes more than 1 s" in error["message"]) == ("response_format", True)
    assert server.engine.requests == []


def test_an_accepted_schema_is_compiled_once(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    run = subprocess.run
    monkeypatch.setattr(
        schema_checks.subprocess, "run", lambda *values, **named: runs.append(1) or run(*values, **named)
    )
    schema = {"type": "object", "properties": {"a": {"type": "string", "pattern": "x+", "minLength": 2}}}
    for _ in range(3):
        assert server.chat(response_format=answer_as(schema)).status_code == 200
    assert server.chat(response_format={"type": "json_object"}).status_code == 200
    assert len(runs) == 2
    for wrong in ({"type": "strin"}, {"type": "object", "dependentSchemas": {}}, {"$ref": "#/none"}):
        check_error(server.chat(response_format=answer_as(wrong)), 400, "invalid_schema")


def test_a_process_has_this_ones_path_and_no_secrets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "llguidance.py").write_text(
        "class LLMatcher:\n"
        "    grammar_from_json_schema = staticmethod(str)\n"
        "    validate_grammar = staticmethod(lambda _: 'mine ' + __import__('os').environ.get('SECRET', 'none'))\n"
    )
    monkeypatch.setenv("SECRET", "private")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert schema_checks._reason_against("{}") == "the JSON schema is not supported: mine none"


def test_a_process_that_dies_or_hangs_is_a_refusal(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    died = subprocess.CompletedProcess([], -9, "", "")
    monkeypatch.setattr(schema_checks.subprocess, "run", lambda *_, **__: died)
    error = check_error(server.chat(response_format={"type": "json_object"}), 400, "invalid_schema")
    assert "memory" in error["message"]
    monkeypatch.undo()
    monkeypatch.setattr(schema_checks, "DEADLINE_S", 0.001)
    check_error(server.chat(response_format={"type": "json_object"}), 503, "unavailable")

"""Checks custom resources against the fields of KubeRay's release in kuberay_v1.yaml."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import yaml

API_VERSION = "ray.io/v1"
_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "object": (dict,),
    "array": (list,),
}


@functools.cache
def kuberay_fields() -> dict[str, Any]:
    """Returns the fields by kind, and the version that has them under `version`."""
    fields: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("kuberay_v1.yaml").read_text(encoding="utf-8"))
    return fields


def problems(resource: dict[str, Any]) -> list[str]:
    """Returns what the Kubernetes API or the operator would refuse: a line per fault, with the field's dotted path."""
    fields, kind = kuberay_fields(), str(resource.get("kind"))
    if resource.get("apiVersion") != API_VERSION or kind not in fields["max_name_length"]:
        return [f"apiVersion {resource.get('apiVersion')!r}, kind {kind!r}: not a resource of {API_VERSION}"]
    name, longest = resource.get("metadata", {}).get("name", ""), fields["max_name_length"][kind]
    found = [f"metadata.name: {name!r} has {len(name)} characters, at most {longest}"] if len(name) > longest else []
    return found + _wrong_fields(resource.get("spec"), fields[kind], "spec")


def _wrong_fields(value: Any, schema: Any, path: str) -> list[str]:
    if isinstance(schema, dict):
        if not isinstance(value, dict):
            return [f"{path}: needs keys, not {value!r}"]
        types = {name.removesuffix("!"): kind for name, kind in schema.items()}
        found = [f"{path}.{key}: unknown field; there are {', '.join(types)}" for key in value.keys() - types.keys()]
        needed = [name.removesuffix("!") for name in schema if name.endswith("!")]
        found += [f"{path}.{name}: required" for name in needed if name not in value]
        return found + [
            line for key in value if key in types for line in _wrong_fields(value[key], types[key], f"{path}.{key}")
        ]
    if isinstance(schema, list) and isinstance(schema[0], dict):
        if not isinstance(value, list):
            return [f"{path}: needs a list, not {value!r}"]
        return [line for index, item in enumerate(value) for line in _wrong_fields(item, schema[0], f"{path}[{index}]")]
    if isinstance(schema, list):
        return [] if value in schema else [f"{path}: {value!r} is not one of {', '.join(schema)}"]
    is_right = isinstance(value, _TYPES[schema]) and (schema == "boolean" or not isinstance(value, bool))
    return [] if is_right else [f"{path}: {value!r} is not of type {schema}"]

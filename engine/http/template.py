"""Puts variables and results into an HTTP step's config (SURFACE 6.7, Part I "Substitution")."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dsl.graph import Node, NodeType
from dsl.substitute import Raw, substitute_base64, substitute_raw
from engine.model import Inputs


@dataclass(frozen=True, slots=True)
class Filled:
    """A config that is ready, and the values of variables that its URL is made of (not to be shown)."""

    config: dict[str, Any]
    hidden: tuple[str, ...]


def fill(node: Node, inputs: Inputs | None) -> Filled:
    """The node's config with its references replaced; `inputs` None: it has none.

    Raises GraphError for a config that is none, SubstitutionError; their texts are the error of the node.
    """
    config = dict(node.http)
    if inputs is None:
        return Filled(config, ())

    def raw(text: str, context: Raw) -> str:
        return substitute_raw(text, variables=inputs.variables, instance_id=inputs.instance_id, label=inputs.label,
                              results=inputs.results, context=context)

    hidden = tuple(inputs.variables[n] for n in inputs.variables if f"{{{n}}}" in config["url"])
    config["url"] = raw(config["url"], Raw.URL)
    headers: dict[str, Any] = {
        name: raw(value, Raw.HEADER) if isinstance(value, str) else value
        for name, value in (config.get("headers") or {}).items()}
    config["headers"] = headers
    if node.type is NodeType.HTTP_MULTIPART:
        config["parts"] = [_part(part, inputs, raw) for part in config["parts"]]
    elif config.get("body") is not None:
        config["body"] = raw(config["body"], Raw.JSON if _says_json(headers) else Raw.BODY)
    return Filled(config, hidden)


def _part(part: Mapping[str, Any], inputs: Inputs, raw: Any) -> dict[str, Any]:
    filled = dict(part)
    for key in ("name", "filename"):
        if part.get(key) is not None:
            filled[key] = raw(part[key], Raw.HEADER)
    template = part["data_b64"]
    data = substitute_base64(template, part=filled["name"], variables=inputs.variables,
                             instance_id=inputs.instance_id, label=inputs.label, results=inputs.results)
    # `$x?` without a value is the text NULL, which happens to be base64 of three bytes: nothing is meant.
    filled["data_b64"] = "" if template.strip().endswith("?") and data == "NULL" else data
    return filled


def _says_json(headers: Mapping[str, Any]) -> bool:
    for name, value in headers.items():
        if name.lower() == "content-type" and isinstance(value, str):
            media = value.partition(";")[0].strip().lower()
            return media == "application/json" or media.endswith("+json")
    return False

"""Puts variables and results into an HTTP step's config (SURFACE 6.7, Part I "Substitution")."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from msgspec.structs import replace

from dsl.graph import Node, NodeType
from dsl.substitute import Raw, substitute_base64, substitute_raw
from engine.http.url import MASK, redact
from engine.model import Inputs

_Fill = Callable[[str, Raw], str]

_BRACES = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}")
#: Stands for a `$` of a secret while references are replaced: what a secret holds is never a reference.
#: Half of a surrogate pair, which no text of PostgreSQL's can hold.
_DOLLAR = "\udc24"


@dataclass(frozen=True, slots=True)
class Filled:
    """A config that is ready, and what must not be seen of it.

    `hidden`: values of variables that the URL is made of. `shown`: the URL as it may be shown, where secrets make it
    (it then has `***` in their place); None: nothing in it is secret.
    """

    config: dict[str, Any]
    hidden: tuple[str, ...] = ()
    shown: str | None = None


def mentioned(config: Mapping[str, Any]) -> frozenset[str]:
    """The names of variables that a config (see `Node.http`) has in places where they are replaced."""
    return frozenset(name for text in _templates(config) for name in _BRACES.findall(text))


def size(config: Mapping[str, Any]) -> int:
    """Characters of the texts in a config that may be large."""
    return sum(map(len, _templates(config)))


def _templates(config: Mapping[str, Any]) -> Iterator[str]:
    yield config["url"]
    yield config.get("body") or ""
    yield from (value for value in (config.get("headers") or {}).values() if isinstance(value, str))
    for part in config.get("parts") or ():
        yield from (part[key] for key in ("name", "filename", "data_b64") if part.get(key) is not None)


def fill(node: Node, inputs: Inputs | None, secrets: Mapping[str, str] | None = None) -> Filled:
    """The node's config with its references replaced; `inputs` None: it has none.

    `secrets`: the values of secret variables; `inputs` holds none of them.
    Raises GraphError for a config that is none, SubstitutionError; their texts are the error of the node.
    """
    config = dict(node.http)
    if inputs is None:
        return Filled(config)
    secrets = secrets or {}
    guarded = {name: value.replace("$", _DOLLAR) for name, value in secrets.items()}
    fill_in = _filler(replace(inputs, variables={**inputs.variables, **guarded}))
    url = config["url"]
    names = mentioned({"url": url})
    hidden = tuple(value for name, value in inputs.variables.items() if name in names)
    shown = None
    if not names.isdisjoint(secrets):
        masked = dict.fromkeys(secrets, MASK)
        shown = redact(_filler(replace(inputs, variables={**inputs.variables, **masked}))(url, Raw.URL), hidden)
    config["url"] = fill_in(url, Raw.URL)
    headers: dict[str, Any] = {name: fill_in(value, Raw.HEADER) if isinstance(value, str) else value
                               for name, value in (config.get("headers") or {}).items()}
    config["headers"] = headers
    if node.type is NodeType.HTTP_MULTIPART:
        every = replace(inputs, variables={**inputs.variables, **guarded})
        config["parts"] = [_part(part, every, fill_in) for part in config["parts"]]
    elif config.get("body") is not None:
        config["body"] = fill_in(config["body"], Raw.JSON if _says_json(headers) else Raw.BODY)
    return Filled(config, hidden, shown)


def _filler(inputs: Inputs) -> _Fill:
    def raw(text: str, context: Raw) -> str:
        return substitute_raw(text, variables=inputs.variables, instance_id=inputs.instance_id, label=inputs.label,
                              results=inputs.results, context=context).replace(_DOLLAR, "$")
    return raw


def _part(part: Mapping[str, Any], inputs: Inputs, raw: _Fill) -> dict[str, Any]:
    filled = dict(part)
    for key in ("name", "filename"):
        if part.get(key) is not None:
            filled[key] = raw(part[key], Raw.HEADER)
    template = part["data_b64"]
    data = substitute_base64(template, part=filled["name"], variables=inputs.variables,
                             instance_id=inputs.instance_id, label=inputs.label, results=inputs.results)
    # `$x?` without a value is the text NULL, which happens to be base64 of three bytes: nothing is meant.
    filled["data_b64"] = "" if template.strip().endswith("?") and data == "NULL" else data.replace(_DOLLAR, "$")
    return filled


def _says_json(headers: Mapping[str, Any]) -> bool:
    for name, value in headers.items():
        if name.lower() == "content-type" and isinstance(value, str):
            media = value.partition(";")[0].strip().lower()
            return media == "application/json" or media.endswith("+json")
    return False

"""The KV cache among a model's arguments and outputs: `cache` since transformers 5.24, `past_key_values` before."""

from __future__ import annotations

import inspect
from collections.abc import Container, Mapping
from typing import Any

from fastfill.errors import UserError

NAME, OLD_NAME = "cache", "past_key_values"


def find(arguments: Mapping[str, Any], parameters: Container[str] = (NAME,)) -> Any:
    """The cache that a call brings, or None. parameters: names that the callee has. Where `cache` is one of them, the old name
    is taken if the new one is not there at all, as transformers does it; elsewhere `cache` means nothing."""
    return arguments.get(NAME if NAME in parameters and NAME in arguments else OLD_NAME)


def of_layer(arguments: Mapping[str, Any]) -> Any:
    """The cache that a model hands to a layer, or None. Beside the old name `cache` is a word of the caller's."""
    return arguments[OLD_NAME] if OLD_NAME in arguments else arguments.get(NAME)


def check(parameters: Container[str]) -> None:
    """Raises UserError where a model's arguments have names, and none of them is the cache's: parts of a prompt would be taken
    for whole ones."""
    if "input_ids" in parameters and NAME not in parameters and OLD_NAME not in parameters:
        raise UserError(
            "This model takes its KV cache under a name that fastfill does not know; use a version of transformers that it "
            "supports (docs/transformers.md)."
        )


def name(model: Any) -> str:
    """What a transformers model calls it."""
    return NAME if NAME in inspect.signature(type(model).forward).parameters else OLD_NAME


def given(model: Any, cache: Any) -> dict[str, Any]:
    """Arguments that hand this cache to a transformers model."""
    return {name(model): cache, "use_cache": True}


def left(output: Any) -> Any:
    """The cache in a transformers model's output."""
    return find(output)

"""Is a value one that its field allows? Names and ranges stand in the fields of dataclasses
(`mar.config.one_of`, `registered`, `number`)."""

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

# The names that a field `registered` may hold. Looked up when a value is checked, so that what a
# fork adds to a dictionary counts.
Registries = Mapping[str, Callable[[], Collection[str]]]


def field_faults(
    options: Any, prefix: str = "", registries: Registries | None = None
) -> Iterator[str]:
    """Each value against its field's names or range, sections included."""
    for item in fields(options):
        key = prefix + item.name
        value = getattr(options, item.name)
        if is_dataclass(value):
            yield from field_faults(value, f"{key}.", registries)
        elif "names" in item.metadata:
            yield from _name_faults(key, value, item.metadata["names"])
        elif "registry" in item.metadata:
            assert registries is not None
            yield from _name_faults(key, value, registries[item.metadata["registry"]]())
        elif "low" in item.metadata and value is not None:
            yield from range_faults(key, value, item.metadata)


def _name_faults(key: str, value: str, names: Collection[str]) -> Iterator[str]:
    if value not in names:
        yield f"{key}={value} is unknown: choose one of {', '.join(names)}"


def range_faults(key: str, value: float, bounds: Mapping[str, Any]) -> Iterator[str]:
    """A number against {low, high, above}."""
    low, high, above = bounds["low"], bounds["high"], bounds["above"]
    inside = low <= value <= high
    if above and value == low:
        inside = False
    if not inside:
        allowed = f"above {low:g}" if above else f"at least {low:g}"
        if high < math.inf:
            allowed += f" and at most {high:g}"
        yield f"{key}={value} is out of range: it must be {allowed}"

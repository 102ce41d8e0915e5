"""All keys of a verb with type, default and meaning, as their docstrings say it.

jsonargparse hides the keys of a class that can be replaced by a subclass, which model and data are:
the very keys that people look for.
"""

import dataclasses
import inspect
import re
import shutil
import textwrap
from collections.abc import Iterator, Mapping
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from docstring_parser import parse


def _type_name(kind: Any) -> str:
    """Write a type as a user may: `float | None` is "number or null"."""
    if get_origin(kind) in (Union, UnionType):
        return " | ".join(_type_name(part) for part in get_args(kind))
    if get_origin(kind) is Literal:
        return " | ".join(get_args(kind))
    text = kind.__name__ if isinstance(kind, type) else str(kind)
    text = re.sub(r"typing\.|collections\.abc\.", "", text)
    for name, word in {"NoneType": "null", "None": "null", "str": "text", "int": "integer"}.items():
        text = re.sub(rf"\b{name}\b", word, text)
    return text


def keys_of(function: type, prefix: str) -> Iterator[tuple[str, str, str]]:
    """List (key, type = default, meaning) of a class's arguments, going into dataclasses.

    Args:
        function: a class with a Google docstring.
        prefix: what stands before the names, e.g. "model".
    """
    meanings = {p.arg_name: p.description or "" for p in parse(function.__doc__ or "").params}
    hints = get_type_hints(vars(function)["__init__"])
    parameters = inspect.signature(function).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.kind is not p.VAR_KEYWORD}
    if dataclasses.is_dataclass(function):
        defaults = vars(function())  # a signature hides what a default_factory makes
    for name, default in defaults.items():
        if dataclasses.is_dataclass(default):
            yield from keys_of(type(default), f"{prefix}.{name}")
        else:
            shown = "null" if default is None else str(default)
            yield f"{prefix}.{name}", f"{_type_name(hints[name])} = {shown}", meanings.get(name, "")


def help_text(usage: str, sections: Mapping[str, type], closing: str) -> str:
    """Write the help of a verb.

    Args:
        usage: the first lines.
        sections: prefix of the keys to the class whose arguments they are.
        closing: the last lines.
    """
    width = min(100, shutil.get_terminal_size((100, 24)).columns)
    lines = [usage]
    for prefix, function in sections.items():
        lines.append(f"\n{prefix}.*")
        for key, kind, meaning in keys_of(function, prefix):
            lines.append(f"  --{key}  ({kind})")
            said = " ".join(meaning.split())
            lines += textwrap.wrap(said, width, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return "\n".join([*lines, closing])

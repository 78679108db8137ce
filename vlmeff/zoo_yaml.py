"""Reads the text of a zoo file, and says of everything wrong in it where it stands."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from vlmeff.zoo_schema import Problem, ZooFile

LONGEST_LIST, LONGEST_WORD = 64, 200  # beyond: data or weights, which do not belong into the zoo
ABSOLUTE_PATH = re.compile(r"^(?:~?/|[A-Za-z]:[\\/]|file:)|(?<![^\s\"'(=])(?:~?(?:/[\w.\-]+){2,}|[A-Za-z]:\\\w)")
SECRET = re.compile(r"\b(?:hf_|gh[pousr]_|sk-|xox[a-z]-|AKIA)[A-Za-z0-9_\-]{12,}|PRIVATE KEY")


class _Loader(yaml.SafeLoader):
    """safe_load that refuses a key that occurs twice; the plain one keeps the last and drops the rest."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [key.value for key, _ in node.value]
        for i, key in enumerate(keys):
            if key in keys[:i]:
                mark = node.value[i][0].start_mark
                raise yaml.MarkedYAMLError(problem=f"key {key!r} occurs twice in one mapping", problem_mark=mark)
        return super().construct_mapping(node, deep)


# Dates stay text, as in JSON.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def parse(text: str) -> tuple[ZooFile | None, list[Problem]]:
    """Read the text of a zoo file: the file, or None and what is wrong with it (syntax, schema, rule 8)."""
    try:
        raw = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}" if mark else "file"
        return None, [Problem("E-ZOO-01", where, getattr(error, "problem", None) or str(error))]
    try:
        file, found = ZooFile.model_validate(raw), []
    except ValidationError as error:
        file, found = None, [(item["loc"], _message(item)) for item in error.errors(include_url=False)]
    found += _foreign(raw, ())
    return None if found else file, [Problem("E-ZOO-01", _place(raw, loc), message) for loc, message in found]


def _message(item: ErrorDetails) -> str:
    show = item["type"] != "value_error" and isinstance(item["input"], str | int | float)
    return item["msg"].removeprefix("Value error, ") + (f", not {item['input']!r}" if show else "")


def _foreign(value: object, where: tuple[int | str, ...]) -> Iterator[tuple[tuple[int | str, ...], str]]:
    """Rule 8: no weights, no data, no absolute paths, no access tokens."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _foreign(key, where)
            yield from _foreign(item, (*where, key))
    elif isinstance(value, list):
        if sum(isinstance(item, int | float) for item in value) > LONGEST_LIST:
            yield where, f"a list of {len(value)} numbers is data or weights; put it into a file of its own"
        for i, item in enumerate(value):
            yield from _foreign(item, (*where, i))
    elif isinstance(value, bytes):
        yield where, "binary data does not belong into the zoo"
    elif isinstance(value, str):
        if SECRET.search(value):
            yield where, "this looks like an access token; remove and revoke it"  # never repeat it
        elif value.startswith("data:") or max(map(len, value.split()), default=0) > LONGEST_WORD:
            yield where, "encoded data does not belong into the zoo"
        elif ABSOLUTE_PATH.search(value):
            yield where, f"{value!r} holds an absolute path, which means nothing on another machine"


def _place(raw: object, loc: tuple[int | str, ...]) -> str:
    """pydantic's location as a path into the file, without its union tags, with the names of entries."""
    text, node = "", raw
    for i, part in enumerate(loc):
        if isinstance(part, int) and isinstance(node, list) and part < len(node):
            text, node = f"{text}[{part}]", node[part]
            if isinstance(node, dict) and isinstance(node.get("name"), str):
                text += f" ({node['name']})"
        elif isinstance(node, dict) and (part in node or i == len(loc) - 1) and part != "[key]":
            text, node = f"{text}.{part}" if text else str(part), node.get(part)
    return text or "file"

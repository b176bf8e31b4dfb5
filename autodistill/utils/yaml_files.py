"""YAML files of plain data: no tags, no repeated keys, and a limit on size."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from autodistill.errors import InputError
from autodistill.utils.input_files import read_file

# libyaml's parser, where PyYAML was built with it, is some ten times as fast.
_Safe: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
# What people write has some hundreds of lines. A few lines of aliases can stand for more values than memory holds.
_MOST_BYTES = 4_000_000
_MOST_VALUES = 200_000
_DEEPEST = 100
_LARGEST = 2**63


class _PlainLoader(_Safe):
    """Loader of plain data with unique keys; 3e-4 is a number, unlike in YAML 1.1, and a date is text."""

    def get_single_node(self) -> yaml.Node | None:
        """Parse one document, and refuse what is not plain."""
        node: yaml.Node | None = super().get_single_node()
        if node is not None:
            _check(node, {}, 1)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Build one value; whatever is no plain data is refused by line."""
        try:
            found = super().construct_object(node, deep)
        except (ValueError, LookupError) as error:  # of Python's own readers of numbers and truth values
            raise _refusal(f"{str(node.value)[:60]!r} is no {node.tag.rpartition(':')[2]} ({error})", node) from None
        if isinstance(found, int) and abs(found) >= _LARGEST:
            raise _refusal("a whole number has more than 63 bits", node)
        return found


# Not those of dates, bytes, sets and ordered pairs, which are no plain data.
_PlainLoader.yaml_constructors = {
    tag: read
    for tag, read in _Safe.yaml_constructors.items()
    if tag is None or tag.rpartition(":")[2] in ("null", "bool", "int", "float", "str", "seq", "map")
}
_PlainLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if tag != "tag:yaml.org,2002:timestamp"]
    for first, known in _Safe.yaml_implicit_resolvers.items()
}
_PlainLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+\Z", re.ASCII), list("-+0123456789")
)


def _refusal(problem: str, node: yaml.Node) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def _check(node: yaml.Node, known: dict[int, int], depth: int) -> int:
    """Refuse what is not plain data before any of it is built; return how many values a node stands for.

    Args:
        node: Of a composed document; two that are one value, by an alias, are one object.
        known: The count of each node that was counted, as many for an alias as for what it names; 0 while it is.
        depth: Of the node, 1 at the top.

    Raises:
        ConstructorError: A key twice, too many values, too deep, or a node within itself.
    """
    if (count := known.get(id(node))) is not None:
        if not count:
            raise _refusal("a value holds itself, by an alias", node)
        return count
    if depth > _DEEPEST:
        raise _refusal(f"it is nested deeper than {_DEEPEST} levels", node)
    known[id(node)] = 0
    parts: list[yaml.Node] = list(node.value) if isinstance(node, yaml.SequenceNode) else []
    if isinstance(node, yaml.MappingNode):
        keys = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in keys:
                    raise _refusal(f"the key {key.value[:60]} is given twice", node)
                keys.add(key.value)
            parts += (key, value)
    total = 1 + sum(_check(part, known, depth + 1) for part in parts)
    if total > _MOST_VALUES:
        raise _refusal(f"with its aliases it stands for more than {_MOST_VALUES:,} values", node)
    known[id(node)] = total
    return total


def read_yaml(path: Path) -> Any:
    """Return the content of a file.

    Raises:
        InputError: An unreadable file, or anything but plain data, with its line.
    """
    # The bytes are given, so that YAML's own rules on encoding apply.
    return parse_yaml(read_file(path, _MOST_BYTES), str(path))


def parse_yaml(data: bytes | str, where: str) -> Any:
    """Return the content of a YAML text.

    Args:
        data: The YAML.
        where: It stands, for the message.

    Raises:
        InputError: Anything but plain data, with its line.
    """
    try:
        return yaml.load(data, _PlainLoader)  # a safe one
    except RecursionError:
        raise InputError(f"{where}: not plain data: it is nested too deep") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{where}, line {mark.line + 1}" if mark else where
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "unreadable"
        # What constructs values refuses tags and repeated keys; all else is syntax.
        kind = "plain data" if isinstance(error, yaml.constructor.ConstructorError) else "valid YAML"
        raise InputError(f"{where}: not {kind}: {problem}") from None

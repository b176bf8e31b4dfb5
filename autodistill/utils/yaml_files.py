"""YAML files of plain data: no tags, no repeated keys, and a limit on size."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from autodistill.errors import InputError
from autodistill.utils.input_files import read_file

# libyaml's parser is about ten times as fast. PyYAML is not always built with it.
_Safe: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
# Hand-written files have some hundred lines. A few lines of aliases can stand for more values than memory holds.
_MOST_BYTES = 4_000_000
_MOST_VALUES = 200_000
_DEEPEST = 100
_LARGEST = 2**63


class _PlainLoader(_Safe):
    """Loader of plain data with unique keys. Unlike in YAML 1.1, 3e-4 is a number. A date is text."""

    def get_single_node(self) -> yaml.Node | None:
        """Parse one document, and refuse anything that is not plain data."""
        node: yaml.Node | None = super().get_single_node()
        if node is not None:
            _check(node, {}, 1)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Build one value. Anything that is not plain data is refused with its line."""
        try:
            found = super().construct_object(node, deep)
        except (ValueError, LookupError) as error:  # from Python's own parsers of numbers and truth values
            raise _refusal(f"{str(node.value)[:60]!r} is no {node.tag.rpartition(':')[2]} ({error})", node) from None
        if isinstance(found, int) and abs(found) >= _LARGEST:
            raise _refusal("a whole number has more than 63 bits", node)
        return found


# Without the constructors of dates, bytes, sets and ordered pairs, which are not plain data.
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
    """Refuse anything that is not plain data before it is built; return how many values a node stands for.

    Args:
        node: A node of a composed document. An alias and what it refers to are the same object.
        known: The counts of the nodes that were counted. An alias counts as much as what it refers to. A node that is
            still being counted has 0.
        depth: Depth of the node; 1 at the top.

    Raises:
        ConstructorError: A key appears twice, there are too many values, the nesting is too deep, or a node contains
            itself.
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
        InputError: The file is unreadable, or has something other than plain data; the message has the line.
    """
    # Bytes are passed, so that YAML's own rules on encoding apply.
    return parse_yaml(read_file(path, _MOST_BYTES), str(path))


def parse_yaml(data: bytes | str, where: str) -> Any:
    """Return the content of a YAML text.

    Args:
        data: The YAML text.
        where: Name of its source, for the message.

    Raises:
        InputError: The text has something other than plain data; the message has the line.
    """
    try:
        return yaml.load(data, _PlainLoader)  # a safe loader
    except RecursionError:
        raise InputError(f"{where}: not plain data: it is nested too deep") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{where}, line {mark.line + 1}" if mark else where
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "unreadable"
        # The code that builds values refuses tags and repeated keys. Any other error is one of syntax.
        kind = "plain data" if isinstance(error, yaml.constructor.ConstructorError) else "valid YAML"
        raise InputError(f"{where}: not {kind}: {problem}") from None

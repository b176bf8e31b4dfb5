"""YAML files of plain data: no tags, each key once."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from autodistill.errors import InputError

# libyaml's parser, where PyYAML was built with it, is some ten times as fast.
_Safe: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _PlainLoader(_Safe):
    """Plain data only, each key once; 3e-4 is a number, as in JSON, though not in YAML 1.1."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        repeated = next((key for key in keys if keys.count(key) > 1), None)
        if repeated is not None:
            raise yaml.constructor.ConstructorError(None, None, f"the key {repeated} is given twice", node.start_mark)
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        return found


_PlainLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+\Z", re.ASCII), list("-+0123456789")
)


def read_yaml(path: Path) -> Any:
    """What the file holds.

    Raises:
        InputError: An unreadable file, or anything but plain data, with its line.
    """
    try:
        # The bytes are given, so that YAML's own rules on encoding apply; the loader is a safe one.
        return yaml.load(path.read_bytes(), _PlainLoader)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "unreadable"
        # What constructs values refuses tags and repeated keys; all else is syntax.
        kind = "plain data" if isinstance(error, yaml.constructor.ConstructorError) else "valid YAML"
        raise InputError(f"{where}: not {kind}: {problem}") from None

"""Small wrong changes of a module's source, one at a time, and the marks that show which tests reach a line.

The mutations are of the usual kinds. An operator of comparison, arithmetic or logic becomes its neighbour. A number
becomes one more, one less or two percent larger. A condition or a truth value is inverted, or a `not` is dropped. `min`
and `max` are swapped, and a slice ends one element off. A value is not returned, or a statement is left out. Changes
that no test of behaviour could see are not made: in annotations, texts and the format of numbers in them, and imports
for types alone.
"""

from __future__ import annotations

import ast
import copy
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

_OPERATORS: dict[type[ast.AST], tuple[type[ast.AST], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
    ast.Add: (ast.Sub,),
    ast.Sub: (ast.Add,),
    ast.Mult: (ast.Div,),
    ast.Div: (ast.Mult,),
    ast.FloorDiv: (ast.Div,),
    ast.Mod: (ast.Mult,),
    ast.Pow: (ast.Mult,),
    ast.BitAnd: (ast.BitOr,),
    ast.BitOr: (ast.BitAnd,),
    ast.LShift: (ast.RShift,),
    ast.RShift: (ast.LShift,),
    ast.And: (ast.Or,),
    ast.Or: (ast.And,),
}
_PAIRS = (("min", "max"), ("amin", "amax"), ("minimum", "maximum"), ("floor", "ceil"), ("any", "all"))
_OTHER = {one: other for pair in _PAIRS for one, other in (pair, pair[::-1])}

_Node = ast.AST
_Path = tuple[tuple[str, int | None], ...]  # the fields and list indices on the way from the module to a node


@dataclass(frozen=True, kw_only=True)
class Mutation:
    """One wrong change.

    Attributes:
        module: Path of the file in the repository.
        line: First line of its innermost statement.
        reached: The line whose mark shows that a test reaches it, or None if it runs when the module is imported.
        kind: What is changed.
        before, after: The first line of the statement or of an expression in it, before and after the change. If
            several expressions in a statement are the same, all except the first have a number here.
        source: Returns the module's whole text with the change.
    """

    module: str
    line: int
    reached: int | None
    kind: str
    before: str
    after: str
    source: Callable[[], str]


def mutations(module: str, text: str) -> list[Mutation]:
    """Return all wrong changes of a module."""
    tree = ast.parse(text)
    found = []
    alike: Counter[tuple[int, str, str, str]] = Counter()
    for path, node, statement, inside in _walk(tree):
        for kind, changed in _changes(node, path[-1][0] if path else ""):

            def made(path: _Path = path, changed: _Node = changed) -> ast.Module:
                whole = copy.deepcopy(tree)
                _put(whole, path, changed)
                return ast.fix_missing_locations(whole)

            if isinstance(node, ast.stmt):
                before, after = _short(node), "pass" if isinstance(changed, ast.Pass) else _short(changed)
            else:
                before, after = _short(node), _short(changed)
            assert statement is not None
            key = (statement.lineno, kind, before, after)
            alike[key] += 1
            number = f", no. {alike[key]}" if alike[key] > 1 else ""
            found.append(
                Mutation(
                    module=module,
                    line=getattr(node, "lineno", statement.lineno),
                    reached=statement.lineno if inside else None,
                    kind=kind,
                    before=before if isinstance(node, ast.stmt) else f"{_short(statement)}  [{before}{number}]",
                    after=after,
                    source=lambda made=made: ast.unparse(made()),  # type: ignore[misc]
                )
            )
    return found


def _short(node: _Node) -> str:
    operator = ast.unparse(node).strip() if not isinstance(node, (ast.operator, ast.cmpop, ast.boolop)) else ""
    return (operator or type(node).__name__).splitlines()[0]


def _walk(tree: ast.Module) -> Iterator[tuple[_Path, _Node, ast.stmt | None, bool]]:
    """Yield the nodes that may be changed, with their path, innermost statement, and whether they are in a function."""

    def visit(
        node: _Node, path: _Path, statement: ast.stmt | None, inside: bool
    ) -> Iterator[tuple[_Path, _Node, ast.stmt | None, bool]]:
        """Yield a node and all below it, except where no test could see a change."""
        if isinstance(node, (ast.FormattedValue, ast.Import, ast.ImportFrom)):
            return
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "__name__ == '__main__'"):
            return
        if isinstance(node, ast.stmt):
            statement = node
        if path:
            yield path, node, statement, inside
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "type_params", "decorator_list", "keywords_of_types"):
                continue
            # Defaults are computed where the function is defined, and its body runs where it is called.
            within = inside or (isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and name == "body")
            if isinstance(value, list):
                for place, one in enumerate(value):
                    if isinstance(one, ast.AST):
                        yield from visit(one, (*path, (name, place)), statement, within)
            elif isinstance(value, ast.AST):
                yield from visit(value, (*path, (name, None)), statement, within)

    yield from visit(tree, (), None, False)


def _changes(node: _Node, field: str) -> Iterator[tuple[str, _Node]]:
    for other in _OPERATORS.get(type(node), ()):
        kind = (
            "comparison" if isinstance(node, ast.cmpop) else "logic" if isinstance(node, ast.boolop) else "arithmetic"
        )
        yield kind, other()
    if isinstance(node, ast.Constant):
        if isinstance(node.value, bool):
            yield "truth", ast.Constant(not node.value)
        elif isinstance(node.value, int):
            yield "one more", ast.Constant(node.value + 1)
            yield "one less", ast.Constant(node.value - 1)
        elif isinstance(node.value, float):
            yield "x 1.02", ast.Constant(node.value * 1.02 if node.value else 0.02)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub)):
        yield "dropped not" if isinstance(node.op, ast.Not) else "dropped minus", node.operand
    elif isinstance(node, (ast.Name, ast.Attribute)) and field == "func":
        name = node.id if isinstance(node, ast.Name) else node.attr
        if name in _OTHER:
            other = _OTHER[name]
            changed = ast.Name(other, ast.Load()) if isinstance(node, ast.Name) else ast.Attribute(node.value, other)
            yield "min for max", changed
    elif isinstance(node, ast.Slice):
        for name in ("lower", "upper"):
            end = getattr(node, name)
            if end is not None and not isinstance(end, ast.Constant):
                moved = copy.copy(node)
                setattr(moved, name, ast.BinOp(end, ast.Add(), ast.Constant(1)))
                yield "slice one off", moved
    elif isinstance(node, (ast.If, ast.While, ast.IfExp)):
        turned = copy.copy(node)
        turned.test = ast.UnaryOp(ast.Not(), node.test)
        yield "condition turned round", turned
    elif isinstance(node, ast.Return) and node.value is not None and ast.unparse(node.value) != "None":
        yield "nothing returned", ast.Return(ast.Constant(None))
    elif isinstance(node, (ast.AugAssign, ast.Raise, ast.Continue, ast.Break)) or (
        isinstance(node, ast.Expr) and not isinstance(node.value, (ast.Constant, ast.Yield, ast.YieldFrom))
    ):
        yield "statement left out", ast.Pass()


def _put(tree: ast.Module, path: _Path, node: _Node) -> None:
    parent: _Node = tree
    for name, place in path[:-1]:
        value = getattr(parent, name)
        parent = value if place is None else value[place]
    name, place = path[-1]
    if place is None:
        setattr(parent, name, node)
    else:
        getattr(parent, name)[place] = node


def marked(module: str, text: str) -> str:
    """Return the module with a call `_reached(module, line)` before each statement of its functions."""

    def each(body: list[ast.stmt]) -> list[ast.stmt]:
        """Return statements with a call before each."""
        found: list[ast.stmt] = []
        for number, statement in enumerate(body):
            is_text = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
            if not (number == 0 and is_text) and not isinstance(statement, (ast.Global, ast.Nonlocal)):
                call = ast.parse(f"_reached({module!r}, {statement.lineno})").body[0]
                found.append(call)
            for name in ("body", "orelse", "finalbody"):
                if getattr(statement, name, None) and not isinstance(statement, ast.ClassDef):
                    setattr(statement, name, each(getattr(statement, name)))
            for part in (*getattr(statement, "handlers", ()), *getattr(statement, "cases", ())):
                part.body = each(part.body)
            found.append(statement)
        return found

    tree = ast.parse(text)

    def functions(node: _Node) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                child.body = each(child.body)
            elif isinstance(child, (ast.ClassDef, ast.If, ast.Try)):
                functions(child)

    functions(tree)
    place = next(
        (n + 1 for n, s in enumerate(tree.body) if isinstance(s, ast.ImportFrom) and s.module == "__future__"), 0
    )
    tree.body.insert(place, ast.parse("from autodistill_reached import reached as _reached").body[0])
    return ast.unparse(ast.fix_missing_locations(tree))

"""Render chat templates as transformers does, but with a limit on the work, so that rendering always ends.

A template is a program that comes with a model. Its sandbox protects the machine, but does not prevent an endless loop
or a full memory. Here each block that it enters, and each character that it produces, is counted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError
from jinja2.compiler import CodeGenerator
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers.utils import chat_template_utils

# Real templates take at most some hundred blocks and characters for each character of the conversation.
_LEAST_WORK = 20_000_000
_WORK_OF_A_CHARACTER = 200
_BLOCK = 20  # work of a block or a value: it takes some microseconds, while a character takes some nanoseconds
_LONGEST_NUMBER = 100_000  # bits
_LONGEST_TEXT = 2_000_000  # characters of a template itself
# Characters that a template may write for a conversation. Real templates add some thousand to the conversation's own.
_MOST_WRITTEN = 50_000
_TIMES_WRITTEN = 20
_WRITERS = ("tojson", "string", "pprint", "escape", "e", "forceescape", "urlencode", "xmlattr")
_WIDTH = re.compile(r"\d{6,}")


class _EndlessError(TemplateError):
    """A template needed more work than any rendering does."""

    def __init__(self) -> None:
        super().__init__("it takes far more work than a conversation needs: it may never end")


class _Counting(CodeGenerator):
    """Code generator that adds a count at the beginning of each block: loop, macro, branch."""

    def blockvisit(self, nodes: Iterable[Any], frame: Any) -> None:
        self.writeline(f"environment.spend({_BLOCK})")
        super().blockvisit(nodes, frame)

    def visit_Template(self, node: Any, frame: Any = None) -> None:
        """Generate the code of a template, with functions that count."""
        super().visit_Template(node, frame)
        # The generated code joins its pieces with these functions. It looks up their names when it runs.
        self.writeline("concat = environment.concat")
        self.writeline("str_join = environment.str_join")
        self.writeline("str = environment.text")


class _Bounded(ImmutableSandboxedEnvironment):
    """A template environment with a limit on the work."""

    code_generator_class = _Counting
    intercepted_binops = frozenset(("+", "*", "**", "%"))
    left = _LEAST_WORK

    def spend(self, work: int) -> None:
        """Count work, and raise `_EndlessError` above the limit."""
        self.left -= work
        if self.left < 0:
            raise _EndlessError

    def concat(self, pieces: Iterable[str]) -> str:
        kept = []
        for piece in pieces:
            self.spend(len(piece))
            kept.append(piece)
        return "".join(kept)

    def str_join(self, pieces: Iterable[Any]) -> str:
        return self.concat(map(self.text, pieces))

    def text(self, value: Any) -> str:
        """Return the text of a value. The parts of a list are counted first, since they may be repeated many times."""
        if not isinstance(value, str):
            self._check_parts(value)
        return str(value)

    def _check_parts(self, value: Any) -> int:
        """Count the parts of a value as work, each repetition separately, and return their number."""
        waiting, count = [value], 0
        while waiting:
            one = waiting.pop()
            count += 1
            self.spend(_BLOCK + (len(one) if isinstance(one, str) else 0))
            if isinstance(one, Mapping):
                waiting += [*one.keys(), *one.values()]
            elif isinstance(one, list | tuple):
                waiting += one
        return count

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute an operation, unless its result is larger than the work that is left."""
        if operator == "*" and (_sized(left) or _sized(right)):
            times = right if _sized(left) else left
            self.spend(len(left if _sized(left) else right) * max(times if isinstance(times, int) else 1, 1))
        elif operator == "+" and _sized(left) and _sized(right):
            self.spend(len(left) + len(right))
        elif operator == "%" and isinstance(left, str):
            self._check_format(left, right if isinstance(right, tuple) else (right,))
        elif isinstance(left, int) and isinstance(right, int) and operator in ("*", "**"):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            if bits > _LONGEST_NUMBER:
                raise _EndlessError
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, called: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a function, macro or method, unless its arguments ask for a huge result."""
        owner = getattr(called, "__self__", None)
        if isinstance(owner, str):
            name = getattr(called, "__name__", "")
            if name == "join" and args:
                args = (self._listed(args[0], len(owner)), *args[1:])
            self._check_made(name, owner, args, kwargs)
        else:
            self._check_sizes(args, kwargs)
        return self._counted(super().call(context, called, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Return the sandbox's own formatting, with limited widths."""
        made = super().wrap_str_format(value)
        if made is None:
            return None

        def checked(*args: Any, **kwargs: Any) -> str:
            self._check_format(str(value.__self__), (*args, *kwargs.values()))
            return made(*args, **kwargs)

        return checked

    def bound_filters(self) -> None:
        """Replace all filters by ones that count their results and refuse huge ones."""
        self.filters = {name: self._bounded(name, call) for name, call in self.filters.items()}

    def _bounded(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        # Jinja passes such filters the context, or the like, before the value.
        first = 1 if hasattr(call, "jinja_pass_arg") else 0

        def bounded(*args: Any, **kwargs: Any) -> Any:
            """Count what the filter may write, then call it."""
            value, rest = args[first] if len(args) > first else "", args[first + 1 :]
            if name == "join":
                value = self._listed(value, len(rest[0]) if rest and isinstance(rest[0], str) else 0)
                args = (*args[:first], value, *rest)
            elif name in _WRITERS and not isinstance(value, str):
                # Each part may be on a line of its own, after an indent.
                widths = [width for width in (*rest, *kwargs.values()) if type(width) is int]
                self.spend(self._check_parts(value) * max([1, *widths]))
            elif isinstance(value, str):
                self._check_made(name, value, rest, kwargs)
            else:
                self._check_sizes(rest, kwargs)
            return self._counted(call(*args, **kwargs))

        bounded.__dict__.update(getattr(call, "__dict__", {}))
        return bounded

    def _listed(self, values: Iterable[Any], between: int) -> list[Any]:
        kept = []
        for value in values:
            self.spend(_BLOCK + between + (len(value) if isinstance(value, str) else 0))
            kept.append(value)
        return kept

    def _counted(self, made: Any) -> Any:
        self.spend(_BLOCK + (len(made) if _sized(made) else 0))
        return made

    def _check_sizes(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Refuse numbers that ask for too many copies, spaces or items."""
        for value in (*args, *kwargs.values()):
            if type(value) is int and value > self.left:
                raise _EndlessError

    def _check_made(self, name: str, text: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Refuse a huge result of a method or filter on a text."""
        self._check_sizes(args, kwargs)
        texts = [value for value in (*args, *kwargs.values()) if isinstance(value, str)]
        numbers = [value for value in (*args, *kwargs.values()) if type(value) is int]
        if name == "replace" and len(texts) > 1:
            self.spend(text.count(texts[0]) * len(texts[1]))
        elif name in ("expandtabs", "indent"):
            self.spend(len(text) * max([len(one) for one in texts] + numbers + [1]))
        elif name == "format":  # only the filter: `wrap_str_format` handles the method
            self._check_format(text, (*args, *kwargs.values()))

    def _check_format(self, form: str, values: Iterable[Any]) -> None:
        """Refuse absurd widths in a format or among its arguments."""
        if _WIDTH.search(form):
            raise _EndlessError
        for value in values:
            if (isinstance(value, str) and _WIDTH.fullmatch(value)) or (
                type(value) is int and value.bit_length() > _LONGEST_NUMBER
            ):
                raise _EndlessError
            if type(value) is int and "*" in form and value > self.left:
                raise _EndlessError


def _sized(value: Any) -> bool:
    return isinstance(value, str | list | tuple)


class ChatTemplate:
    """A compiled chat template.

    Args:
        text: The template in Jinja.

    Raises:
        TemplateError: The text is no template.
    """

    def __init__(self, text: str) -> None:
        if len(text) > _LONGEST_TEXT:
            raise TemplateError(f"it has {len(text):,} characters")
        # Use transformers' own functions, filters and tags. It offers no public access to them.
        self._environment = chat_template_utils._cached_compile_jinja_template("").environment
        self._environment.__class__ = _Bounded
        self._environment.bound_filters()
        self._template = self._environment.from_string(text)

    def render(self, messages: Sequence[Mapping[str, str]], asking: bool, tokens: Mapping[str, Any]) -> str:
        """Return the text of a conversation, as `apply_chat_template` does.

        Args:
            messages: The messages, each with its role and content.
            asking: Whether an answer is written next.
            tokens: The special tokens by their names.

        Raises:
            TemplateError: The template refuses the conversation, may never end, or writes far more than it is given.
            Exception: The template's code raises another error.
        """
        characters = sum(len(text) for message in messages for text in message.values())
        self._environment.left = _LEAST_WORK + _WORK_OF_A_CHARACTER * characters
        fresh = [dict(message) for message in messages]
        text = self._template.render(messages=fresh, tools=None, documents=None, add_generation_prompt=asking, **tokens)
        if len(text) > _MOST_WRITTEN + _TIMES_WRITTEN * characters:
            raise TemplateError(f"it writes {len(text):,} characters for a conversation of {characters:,}")
        return str(text)


@lru_cache(maxsize=16)
def chat_template(text: str) -> ChatTemplate:
    """Return the compiled template of a text; the last 16 are cached."""
    return ChatTemplate(text)

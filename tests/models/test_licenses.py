"""A licence is one line of text, whatever a model or data set has under that name."""

from __future__ import annotations

import pytest

from autodistill.models.licenses import stated


@pytest.mark.parametrize(
    ("license", "said"),
    [
        ("Apache-2.0", "Apache-2.0"),
        (" mit\n---\ntags: [a]\t\x1b[31m", "mit --- tags: [a] [31m"),
        (["mit", "apache-2.0", 3, ["x"]], "mit, apache-2.0, x"),
        (("mit",), "mit"),
        ("x" * 5000, "x" * 200),
        *((nothing, None) for nothing in (None, "", " \n", 3, 2.5, True, {"name": "mit"}, [], [3], b"mit")),
    ],
)
def test_what_is_legible_is_kept_in_one_line(license: object, said: str | None) -> None:
    assert stated(license) == said

"""README.zh-CN.md matches the current README.md: changes are named, and figures are updated automatically."""

from __future__ import annotations

import re

import pytest

from benchmarks.documents import translation

PAGE = """# Title

Training took 10 minutes, and memory is 204 MB ([more](docs/a.md)).

<!-- leaderboard x 1 -->
```
row  0.4608

end
```

```sh
run --budget 16GB       # the first one
run --fast              # the second one
```
"""
TRANSLATED = """[English](README.md)

<!-- en 0123456789ab -->
# 标题

<!-- en 0123456789ab -->
训练用了 10 分钟，内存为 204 MB（[详情](docs/a.md)）。

<!-- en 0123456789ab -->
<!-- leaderboard x 1 -->
```
row  0.4608

end
```

<!-- en 0123456789ab -->
```sh
run --budget 16GB       # 第一个
run --fast              # 第二个
```
"""


@pytest.fixture
def mine() -> str:
    return translation.done(PAGE, TRANSLATED)


def test_the_readme_is_translated_as_it_stands():
    assert translation.faults() == []


def test_every_command_and_link_of_the_readme_is_in_the_translation():
    english, chinese = (path.read_text(encoding="utf-8") for path in (translation.ENGLISH, translation.CHINESE))
    for pattern in (r"\]\(([^)]+)\)", r"(?m)^(autodistill [^#\n]*?)(?:\s+#.*)?$", r"`([^`\n]+)`"):
        assert {*re.findall(pattern, english)} - {*re.findall(pattern, chinese)} <= {"README.zh-CN.md"}


def test_a_translation_in_step_has_no_fault(mine):
    assert translation.compare(PAGE, mine) == ([], mine)


def test_words_that_have_changed_are_named_and_left_to_a_translator(mine):
    (fault,), text = translation.compare(PAGE.replace("Training took", "Searching took"), mine)
    assert "README.md line 3 have changed" in fault
    assert "Searching took 10 minutes" in fault
    assert text == mine


def test_figures_follow(mine):
    faults, text = translation.compare(PAGE.replace("10 minutes", "9.5 minutes").replace("204", "1,204"), mine)
    assert faults == []
    assert "训练用了 9.5 分钟，内存为 1,204 MB（[详情](docs/a.md)）。" in text


def test_code_follows_and_its_comments_stay(mine):
    page = PAGE.replace("0.4608", "0.4700").replace("16GB", "8GB").replace("run --fast ", "run --slow ")
    faults, text = translation.compare(page, mine)
    assert faults == []
    assert "row  0.4700\n\nend\n" in text
    assert "run --budget 8GB       # 第一个\nrun --slow              # 第二个\n" in text
    assert "<!-- leaderboard x 1 -->\n```\n" in text


def test_a_comment_of_code_that_has_changed_is_named(mine):
    (fault,), _ = translation.compare(PAGE.replace("the second one", "another one"), mine)
    assert "another one" in fault


def test_a_paragraph_more_is_named(mine):
    (fault,), text = translation.compare(PAGE + "\nA new one.\n", mine)
    assert "README.md has 5 paragraphs, and README.zh-CN.md translates 4" in fault
    assert fault.endswith("A new one.")
    assert text == mine


def test_a_figure_or_a_link_that_is_another_is_named(mine):
    (fault,), _ = translation.compare(PAGE, mine.replace(" 204", ""))
    assert "other figures" in fault
    (fault,), _ = translation.compare(PAGE, mine.replace("docs/a.md", "docs/b.md"))
    assert "other links" in fault


def test_a_digit_of_a_name_is_no_figure(mine: str) -> None:
    """In Chinese the figure may stand before the name."""
    english = PAGE.replace("memory is 204 MB", "memory of SmolLM2 is 204 MB")
    chinese = translation.done(english, mine.replace("内存为 204 MB", "204 MB 是 SmolLM2 的内存"))
    assert "204 MB 是 SmolLM2 的内存" in chinese
    _, mended = translation.compare(english.replace("204", "205.5"), chinese)
    assert "205.5 MB 是 SmolLM2 的内存" in mended

from __future__ import annotations

import pytest

import autodistill as ad


def test_a_misspelt_argument_is_answered_with_the_one_that_was_meant():
    with pytest.raises(TypeError, match=r"plan\(\) takes no 'bugdet'; did you mean budget\?"):
        ad.plan(bugdet="8GB")

"""The shipped beliefs are read as they were written, and anything else is refused."""

import json

import pytest

from autodistill.errors import InputError
from autodistill.search.prior.knowledge import RATE, Knowledge, load


def test_what_ships_is_read_and_written():
    shipped = load()
    assert Knowledge.from_json(json.loads(json.dumps(shipped.to_json()))) == shipped
    assert all(belief.sd >= 0 for belief in shipped.beliefs.values())
    data = shipped.to_json()
    with pytest.raises(InputError, match="lacks rate"):
        Knowledge.from_json(data | {"beliefs": {n: b for n, b in data["beliefs"].items() if n != "rate"}})
    with pytest.raises(InputError, match="has no beliefs"):
        Knowledge.from_json([])
    with pytest.raises(InputError, match="must be a finite number"):
        Knowledge.from_json(data | {"between": data["between"] | {RATE: "wide"}})

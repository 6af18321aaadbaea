"""Named mutants: each is a slip in code as it stands, and names tests that there are."""

import pytest
from mutants.__main__ import NAMED, ROOT


@pytest.mark.parametrize("mutant", NAMED, ids=lambda mutant: mutant.name)
def test_it_applies(mutant):
    assert mutant.applied(ROOT) != (ROOT / mutant.file).read_text(encoding="utf-8")
    for test in mutant.tests:
        assert (ROOT / test.partition("::")[0]).exists(), test

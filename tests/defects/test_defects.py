"""The list of seeded defects is true to the code; `make defects` tries them."""

from __future__ import annotations

from pathlib import Path

import pytest

import ghostcacher
from tests.defects.seeded import DEFECTS

PACKAGE = Path(ghostcacher.__file__).parent
TESTS = Path(__file__).parents[1]


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.name)
def test_a_defect_can_be_put_in_and_its_tests_stand(defect):
    assert (PACKAGE / defect.file).read_text().count(defect.old) == 1
    files = [word for word in defect.tests.split() if word.endswith(".py")]
    assert files
    assert all((TESTS.parent / file).is_file() for file in files)


def test_no_defect_is_listed_twice():
    assert len({defect.name for defect in DEFECTS}) == len(DEFECTS) >= 30

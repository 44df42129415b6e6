"""Pages that name tests name tests that exist; every row of the catalogue of faults has one with its number."""

from __future__ import annotations

import re
from pathlib import Path

from tests.reliability import ROOT, rows

CATALOGUE = range(1, 81)
CODES = {"HIT", "MISS", "HEAL", "DROP", "DEGRADE", "BYPASS", "REFUSE"}
IN_WORDS = ("passes through", "swept", "started again", "ends, with code 0", "0 found")
PAGE = list(rows((ROOT / "docs/reliability.md").read_text()))


def numbers(text, pattern):
    """All numbers and ranges that ``pattern`` finds."""
    found = set()
    for first, last in re.findall(pattern, text):
        found |= set(range(int(first), int(last or first) + 1))
    return found


def of_row(row):
    return numbers(row.number, r"\b(\d+)(?:\u2013(\d+))?")


def of_test(name):
    return numbers(name, r"_f(\d\d)(?:_to_f(\d\d))?(?=_)")


def test_every_test_that_the_reliability_page_names_exists():
    assert len(PAGE) > 80
    for row in PAGE:
        assert row.tests, row.line
        for test in row.tests:
            file, name = test.split("::")
            assert f"def {name}(" in (Path(ROOT) / "tests" / file).read_text(), test


def test_every_row_of_the_catalogue_has_a_test_with_its_number():
    for number in CATALOGUE:
        names = [test for row in PAGE if number in of_row(row) and row.number[0] != "P" for test in row.tests]
        assert any(number in of_test(name) for name in names), number


def test_a_numbered_test_stands_in_a_row_of_its_number():
    for row in PAGE:
        for test in row.tests if row.number and row.number[0] != "P" else ():
            assert of_row(row) & of_test(test), (row.number, test)


def test_every_row_says_what_happens_and_how_often_it_was_tried():
    for row in PAGE:
        assert row.trials > 0, row.line
        if not row.number.startswith("P"):
            assert row.outcome.startswith((*CODES, *IN_WORDS)), row.line


def test_every_numbered_test_is_on_the_page():
    named = {test.split("::")[1] for row in PAGE for test in row.tests}
    for path in (ROOT / "tests").rglob("test_*.py"):
        for name in re.findall(r"def (test_f\d\d_\w+)\(", path.read_text()):
            assert name in named, (path.name, name)

"""Runs the tests that docs/reliability.md names, and writes how often they tried each row into its last column.

A test counts once for each of its cases, or as often as it records under ``trials``.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree as ET

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/reliability.md"
_NAMED = re.compile(r"`(?:(?P<file>[a-z0-9_/]+\.py)::)?(?P<test>test_[a-z0-9_]+)`")
_ROW = re.compile(
    r"^\| (?P<row>[^|]*) \| (?P<fault>.*) \| (?P<outcome>[^|]*) \| (?P<tests>.*) \| (?P<trials>[\d,]+) \|$"
)


@dataclass(frozen=True)
class Row:
    """A line of a table of the page that names tests, as ``file::test`` below ``tests``."""

    number: str
    outcome: str
    tests: tuple[str, ...]
    trials: int
    line: str

    def with_trials(self, trials: int) -> str:
        return f"{self.line[: self.line.rindex('| ')]}| {trials:,} |"


def rows(page: str) -> Iterator[Row]:
    """All rows; a test without a file is in the file that was named last."""
    file = ""
    for line in page.splitlines():
        if (match := _ROW.match(line)) is None:
            continue
        tests = []
        for named in _NAMED.finditer(match["tests"]):
            file = named["file"] or file
            tests.append(f"{file}::{named['test']}")
        yield Row(match["row"], match["outcome"], tuple(tests), int(match["trials"].replace(",", "")), line)


def counted(report: Path) -> Counter[str]:
    """Trials of each test in a report of pytest's; skipped ones are none."""
    found: Counter[str] = Counter()
    for case in ET.parse(report).iter("testcase"):  # noqa: S314 (pytest wrote it a moment ago)
        if case.find("skipped") is None:
            file = case.attrib["classname"].removeprefix("tests.").replace(".", "/")
            recorded = [each.attrib["value"] for each in case.iter("property") if each.attrib["name"] == "trials"]
            found[f"{file}.py::{case.attrib['name'].partition('[')[0]}"] += int(recorded[0]) if recorded else 1
    return found


def main() -> int:
    page = PAGE.read_text()
    named = sorted({f"tests/{test}" for row in rows(page) for test in row.tests})
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-o", "junit_family=xunit1", f"--junitxml={report}", *named]
        if code := subprocess.run(command, cwd=ROOT, check=False).returncode:
            return code
        trials = counted(report)
    for row in rows(page):
        page = page.replace(row.line, row.with_trials(sum(trials[test] for test in row.tests)))
    PAGE.write_text(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())

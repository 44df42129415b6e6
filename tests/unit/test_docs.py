"""Pages that name tests name tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
_NAMED = re.compile(r"`(?:(?P<file>[a-z_/]+\.py)::)?(?P<test>test_[a-z0-9_]+)`")


def test_every_test_that_the_reliability_page_names_exists():
    file, missing, named = "", [], 0
    for match in _NAMED.finditer((ROOT / "docs/reliability.md").read_text()):
        file = match["file"] or file
        source = (ROOT / "tests" / file).read_text()
        named += 1
        if f"def {match['test']}(" not in source:
            missing.append((file, match["test"]))
    assert missing == []
    assert named > 50

"""Generated parts of a page, each between two markers of its own."""

from __future__ import annotations

from pathlib import Path


def replace_section(page: Path, name: str, section: str) -> None:
    """Put ``section`` between ``<!-- name: begin -->`` and ``<!-- name: end -->`` of ``page``.

    Raises:
        ValueError: the page has no such markers.
    """
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"
    before, _, rest = page.read_text().partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"{page} has no section {name!r}")
    page.write_text(f"{before}{begin}\n{section.rstrip()}\n\n{end}{after}")

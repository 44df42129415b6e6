from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ghostcacher
from ghostcacher.adapters import table
from ghostcacher.events import CacheReport

PACKAGE = Path(ghostcacher.__file__).parent


def python(code):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout


def test_all_is_sorted_and_every_name_is_there():
    assert ghostcacher.__all__ == sorted(ghostcacher.__all__)
    for name in ghostcacher.__all__:
        assert getattr(ghostcacher, name).__name__ == name


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="nonsense"):
        ghostcacher.nonsense  # noqa: B018 (to ask for it is the test)


def test_importing_the_package_imports_no_torch():
    assert (
        python("import sys, ghostcacher; print('torch' in sys.modules, 'transformers' in sys.modules)").split()
        == ["False"] * 2
    )


def test_keys_stores_index_and_events_import_no_torch():
    modules = (
        "keys index eviction events config units errors stores.directory stores.memory stores.filesystem codecs.header"
    )
    names = ", ".join(f"ghostcacher.{name}" for name in modules.split())
    assert python(f"import {names}, sys; print('torch' in sys.modules)").strip() == "False"


def test_the_command_line_imports_no_torch():
    code = "import sys\nfrom ghostcacher.cli import app, bench, demo, output, upkeep\nprint('torch' in sys.modules)"
    assert python(code).strip() == "False"


def test_the_package_checks_nothing_by_assert():
    """`python -O` must run the same checks."""
    offenders = [
        path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py")
        if "testing" not in path.parts and re.search(r"^\s*assert ", path.read_text(), re.MULTILINE)
    ]  # fmt: skip
    assert offenders == []


def test_a_report_is_one_sentence():
    hit = CacheReport(2063, 1984, "disk", 0.0213, 91_422_720, "hit")
    assert str(hit) == "reused 1,984 of 2,063 prompt tokens from disk (87.2 MiB) in 21 ms"
    assert (
        str(CacheReport(10, 0, "", 0.0, 0, "miss: first seen")) == "reused none of 10 prompt tokens (miss: first seen)"
    )


def test_every_proven_type_is_in_the_parity_matrix():
    from ghostcacher.testing.models import RECIPES

    not_proven = {"jamba", "llama with dynamic rope", "mamba", "minimax", "recurrent_gemma"}
    assert frozenset(RECIPES) - not_proven == table.PROVEN
    assert table.PROVEN & set(table.REFUSED) == {"inkling_text"}
    assert "inkling_text" in table.FIXED_IN


def test_memory_is_used_again_only_when_nobody_holds_it():
    import torch

    from ghostcacher.adapters.memory import empty

    shape, cpu = (1024, 1024, 2), torch.device("cpu")
    first = empty(shape, torch.float32, cpu)
    address, view = first.data_ptr(), first[5]
    del first
    second = empty(shape, torch.float32, cpu)
    assert second.data_ptr() != address
    del view
    assert empty(shape, torch.float32, cpu).data_ptr() == address


def test_durations_and_sizes_read_back():
    from ghostcacher.units import format_bytes, format_seconds, parse_bytes, parse_duration

    assert [parse_bytes(text) for text in ("20GiB", "1.5 GB", "512M", 7)] == [20 * 2**30, 1_500_000_000, 512 * 2**20, 7]
    assert [parse_duration(text) for text in ("90s", "15m", "12h", "7d", "2w")] == [90, 900, 43200, 604800, 1209600]
    assert [format_bytes(n) for n in (3, 1536, 5 * 2**40)] == ["3 B", "1.5 KiB", "5.0 TiB"]
    assert [format_seconds(s) for s in (0.0213, 3.2, 7200, 0.0001)] == ["21 ms", "3.20 s", "2.0 h", "0.10 ms"]

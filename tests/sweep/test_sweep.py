"""Every causal model type, one by one; `make sweep` writes the same into docs/models.md."""

from __future__ import annotations

import pytest

from tests.sweep.examine import CAUSAL_TYPES, NotBuiltError, examine

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("model_type", CAUSAL_TYPES)
def test_a_type_is_exact_or_refused_by_name(model_type, tmp_path):
    try:
        finding = examine(model_type, tmp_path)
    except NotBuiltError as error:
        pytest.skip(str(error))
    assert finding.outcome in {"exact", "refused"}, finding
    assert finding.outcome == "exact" or finding.support.reason

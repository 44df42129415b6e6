"""``python -m tests.sweep``: examine every type and write ``docs/models.md``; see ``make sweep``."""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

from tests.sweep.examine import CAUSAL_TYPES, Finding, NotBuiltError, examine_all

PAGE = Path("docs/models.md")


def main() -> int:
    """Print one line per type that is not exact, write the page of this transformers version; 1 if any is wrong."""
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        found = dict(tqdm(examine_all(Path(directory)), total=len(CAUSAL_TYPES), disable=None))
    outcomes = Counter(finding.outcome if isinstance(finding, Finding) else "not built" for finding in found.values())
    for model_type, finding in found.items():
        if isinstance(finding, NotBuiltError) or finding.outcome in {"wrong", "unused"}:
            sys.stdout.write(f"{model_type}: {finding}\n")
    sys.stdout.write(f"{dict(outcomes)}\n")
    _write(found, outcomes)
    return int(outcomes["wrong"] > 0)


def _write(found: dict[str, Finding | NotBuiltError], outcomes: Counter[str]) -> None:
    opening = f"<!-- begin {transformers.__version__} -->\n"
    closing = f"<!-- end {transformers.__version__} -->\n"
    section = opening + _section(found, outcomes) + closing
    page = PAGE.read_text()
    if opening in page:
        before, rest = page.split(opening)
        page = before + section + rest.split(closing)[1]
    else:
        page += "\n" + section
    PAGE.write_text(page)


def _section(found: dict[str, Finding | NotBuiltError], outcomes: Counter[str]) -> str:
    summary = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
    lines = [
        f"## transformers {transformers.__version__}, torch {torch.__version__.partition('+')[0]}", "",
        f"{len(found)} types: {summary}.", "",
        "| type | status | reused at | layers | tokens reused | largest logit difference |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    served = [(t, f) for t, f in found.items() if isinstance(f, Finding) and f.outcome != "refused"]
    for model_type, finding in served:
        layers = finding.support.layers
        kinds = ", ".join(f"{layers.count(kind)} {kind}" for kind in dict.fromkeys(layers))
        status = finding.support.status if finding.outcome == "exact" else f"**{finding.outcome}** {finding.detail}"
        lines.append(
            f"| {model_type} | {status} | {finding.support.capability} | {kinds} | {finding.reused_tokens} "
            f"| {finding.difference:.1e} |"
        )
    lines += ["", "Refused by name, or not built here:", ""]
    for model_type, finding in found.items():
        if isinstance(finding, NotBuiltError):
            lines.append(f"- `{model_type}`: not built here ({finding})")
        elif finding.outcome == "refused":
            lines.append(f"- `{model_type}`: {finding.support.reason}")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())

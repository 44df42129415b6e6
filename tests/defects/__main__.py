"""``python -m tests.defects``: put each defect into a copy of the package, and see that its tests fail."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.defects.seeded import DEFECTS, Defect

ROOT = Path(__file__).parents[2]


def is_noticed(defect: Defect, copy: Path) -> bool:
    """Whether the named tests fail with ``defect`` in ``copy``, which is as it was afterwards."""
    file = copy / "ghostcacher" / defect.file
    sound = file.read_text()
    file.write_text(sound.replace(defect.old, defect.new, 1))
    try:
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *defect.tests.split()]
        environment = {**os.environ, "PYTHONPATH": str(copy)}
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
    finally:
        file.write_text(sound)
    if done.returncode not in {0, 1}:
        sys.stdout.write(done.stdout[-1500:] + done.stderr[-500:])
    return done.returncode == 1


def main() -> int:
    """Print a line for each defect; how many were noticed by nobody."""
    chosen = [defect for defect in DEFECTS if not sys.argv[1:] or any(word in defect.name for word in sys.argv[1:])]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        ignored = shutil.ignore_patterns(".git", ".venv*", "__pycache__", ".*_cache")
        shutil.copytree(ROOT, copy, ignore=ignored)
        survivors = 0
        for number, defect in enumerate(chosen, 1):
            noticed = is_noticed(defect, copy)
            survivors += not noticed
            print(f"{number}/{len(chosen)} {'noticed' if noticed else 'NOT NOTICED'}: {defect.name}", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} defects noticed")
    return survivors


if __name__ == "__main__":
    sys.exit(min(1, main()))

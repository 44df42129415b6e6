from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

import ghostcacher
from ghostcacher.cli.app import app
from ghostcacher.testing.tier import blocks_of, chain_of

RUNNER = CliRunner()


@pytest.fixture
def directory(tmp_path):
    root = tmp_path / "blocks"
    with ghostcacher.open_store(root, memory=None, block_tokens=16) as store:
        for first in (0, 1000, 2000):
            for block in blocks_of(chain_of(40, first=first)):
                store.offer(block, model="tiny")
    return root


def run(*args, code=0):
    done = RUNNER.invoke(app, list(map(str, args)))
    assert done.exit_code == code, done.output
    return done


def run_json(*args, code=0):
    return json.loads(run(*args, "--format", "json", code=code).stdout)


def age(directory, seconds, first):
    """Make the files of one prompt look unused for long."""
    keys = {key.digest.hex() for key in chain_of(40, first=first).covering(0, 40)}
    for path in directory.rglob("*.safetensors"):
        if path.stem in keys:
            os.utime(path, (time.time() - seconds,) * 2)


def files(directory):
    return sorted(directory.rglob("*.safetensors"))


def test_ls_and_stats(directory):
    (found,) = run_json("ls", "-d", directory)["namespaces"]
    assert (found["model"], found["codec"], found["blocks"]) == ("tiny", "raw", 9)
    stats = run_json("stats", "-d", directory)
    assert stats["blocks"] == 9
    assert stats["size_bytes"] == sum(path.stat().st_size for path in files(directory))
    assert found["namespace"][:12] in run("ls", "-d", directory).stdout
    assert "9 blocks" in run("stats", "-d", directory).stdout


def test_verify_finds_and_deletes_what_is_unsound(directory):
    assert run_json("verify", "-d", directory)["unsound"] == []
    bad, cut, moved = files(directory)[:3]
    data = bytearray(bad.read_bytes())
    data[-1] ^= 1
    bad.write_bytes(data)
    cut.write_bytes(cut.read_bytes()[:50])
    moved.write_bytes(files(directory)[5].read_bytes())
    found = run_json("verify", "-d", directory, code=1)
    assert found["checked"] == 9
    assert sorted(each["reason"] for each in found["unsound"]) == ["corrupt", "header", "key_echo"]
    assert "3 unsound, deleted" in run("verify", "-d", directory, "--delete", code=1).stdout
    assert run_json("verify", "-d", directory) == {"checked": 6, "sealed": 0, "unsound": [], "deleted": 0}


def test_prune_by_age(directory):
    age(directory, 10 * 86400, first=1000)
    assert run_json("prune", "-d", directory, "--older-than", "7d", "--dry-run")["blocks"] == 3
    assert len(files(directory)) == 9
    assert run_json("prune", "-d", directory, "--older-than", "7d")["blocks"] == 3
    assert len(files(directory)) == 6


def test_prune_never_strands_a_child(directory):
    parent = chain_of(40, first=1000).block(0).digest.hex()
    os.utime(next(path for path in files(directory) if path.stem == parent), (1, 1))
    assert run_json("prune", "-d", directory, "--older-than", "7d")["blocks"] == 0


def test_prune_to_a_size_takes_the_oldest_leaves(directory):
    age(directory, 100, first=2000)
    size = files(directory)[0].stat().st_size
    run("prune", "-d", directory, "--to", f"{7 * size}B")
    left = {path.stem for path in files(directory)}
    kept = {key.digest.hex() for first in (0, 1000) for key in chain_of(40, first=first).covering(0, 40)}
    assert kept <= left
    assert chain_of(40, first=2000).tail(40).digest.hex() not in left


def test_rm_takes_a_namespace_by_its_first_digits(directory):
    name = run_json("ls", "-d", directory)["namespaces"][0]["namespace"]
    assert run_json("rm", name[:6], "-d", directory, "--dry-run")["blocks"] == 9
    assert run_json("rm", name[:6], "-d", directory)["blocks"] == 9
    assert run_json("ls", "-d", directory) == {"namespaces": []}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["ls", "-d", "/nowhere/at/all"], "no store"),
        (["prune"], "exactly one"),
        (["prune", "--older-than", "7d", "--to", "1GiB"], "exactly one"),
        (["prune", "--older-than", "soon"], "soon"),
        (["prune", "--to", "little"], "little"),
        (["rm", "zz"], "ghostcacher ls"),
        (["rm", ""], "ghostcacher ls"),
        (["nonsense"], "nonsense"),
        (["ls", "--format", "xml"], "xml"),
    ],
)
def test_wrong_usage_is_exit_code_2_and_one_sentence(directory, args, message):
    given = [*args] if "-d" in args or args[0] == "nonsense" else [*args, "-d", str(directory)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", "from ghostcacher.cli import main; main()", *given]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len(files(directory)) == 9


def test_a_sealed_store_is_looked_after_with_its_key(tmp_path):
    root, key = tmp_path / "blocks", tmp_path / "key"
    assert str(key) in run("new-key", key).stdout
    with ghostcacher.open_store(root, memory=None, block_tokens=16, key=key) as store:
        for block in blocks_of(chain_of(40)):
            store.offer(block, model="tiny")
    given = ("-d", root, "--key-file", key)
    (found,) = run_json("ls", *given)["namespaces"]
    assert (found["model"], found["blocks"]) == ("tiny", 3)
    (hidden,) = run_json("ls", "-d", root)["namespaces"]
    assert (hidden["model"], hidden["blocks"]) == ("(sealed)", 3)
    assert hidden["namespace"] != found["namespace"]
    assert run_json("verify", *given) == {"checked": 3, "sealed": 0, "unsound": [], "deleted": 0}
    assert run_json("verify", "-d", root) == {"checked": 0, "sealed": 3, "unsound": [], "deleted": 0}
    label, body = files(root)[:2]
    for path, at in ((label, 70), (body, -1)):
        content = bytearray(path.read_bytes())
        content[at] ^= 1
        path.write_bytes(content)
    checked = run_json("verify", *given, "--delete", code=1)
    assert [bad["reason"] for bad in checked["unsound"]] == ["auth", "auth"]
    assert len(files(root)) == 1
    assert run_json("rm", found["namespace"][:10], *given)["blocks"] == 1
    assert files(root) == []


def test_without_its_key_nothing_of_a_sealed_store_is_pruned(tmp_path):
    root, key = tmp_path / "blocks", tmp_path / "key"
    run("new-key", key)
    with ghostcacher.open_store(root, memory=None, block_tokens=16, key=key) as store:
        for block in blocks_of(chain_of(40)):
            store.offer(block, model="tiny")
    for file in files(root):
        os.utime(file, (time.time() - 900_000,) * 2)
    left = run_json("prune", "-d", root, "--older-than", "7d")
    assert (left["blocks"], left["sealed"], len(files(root))) == (0, 3, 3)
    assert "--key-file" in run("prune", "-d", root, "--to", "1").stdout
    assert run_json("prune", "-d", root, "--older-than", "7d", "--key-file", key)["blocks"] == 3
    assert files(root) == []

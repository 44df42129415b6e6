"""Where secrets come from."""

from __future__ import annotations

import os
import stat

import pytest

from ghostcacher.config import StoreConfig
from ghostcacher.errors import ConfigurationError
from ghostcacher.keyring import read_key, read_keyring, write_key

SECRET = bytes(range(32))


def test_bytes_are_the_secret_and_paths_name_it(tmp_path):
    file = tmp_path / "key"
    file.write_text(SECRET.hex() + "\n")
    raw = tmp_path / "raw"
    raw.write_bytes(b"\xff" * 40)
    assert read_keyring(SECRET, {}) == (SECRET,)
    assert read_keyring(file, {}) == read_keyring(str(file), {}) == (SECRET,)
    assert read_keyring([b"n" * 32, file, raw], {}) == (b"n" * 32, SECRET, b"\xff" * 40)
    assert read_keyring(None, {}) == ()


def test_the_environment_counts_where_nothing_is_given(tmp_path):
    file = tmp_path / "key"
    file.write_text(SECRET.hex())
    two = f"{file}{os.pathsep}{file}"
    assert read_keyring(None, {"GHOSTCACHER_KEY_FILE": two}) == (SECRET, SECRET)
    assert read_keyring(None, {"GHOSTCACHER_KEY": f"{SECRET.hex()}:{'ab' * 32}"}) == (SECRET, b"\xab" * 32)
    assert read_keyring(b"x" * 32, {"GHOSTCACHER_KEY": SECRET.hex()}) == (b"x" * 32,)


@pytest.mark.parametrize(
    ("given", "environment"),
    [
        (b"canary" * 5, {}),
        ([], {}),
        ("/nowhere/at/all", {}),
        (None, {"GHOSTCACHER_KEY": "canary"}),
        (None, {"GHOSTCACHER_KEY": "ca" * 31}),
        (None, {"GHOSTCACHER_KEY_FILE": "/nowhere/at/all"}),
        ("ca" * 32, {}),
        (None, {"GHOSTCACHER_KEY_FILE": "ca" * 20}),
        ("nul\0", {}),
        (None, {"GHOSTCACHER_KEY_FILE": "/nowhere", "GHOSTCACHER_KEY": "ca" * 32}),
    ],
)
def test_what_is_no_secret_is_refused_without_repeating_it(given, environment):
    with pytest.raises(ConfigurationError) as caught:
        read_keyring(given, environment)
    assert "canary" not in str(caught.value)
    assert "caca" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_an_empty_file_is_refused_by_name(tmp_path):
    (tmp_path / "key").write_text("")
    with pytest.raises(ConfigurationError, match=r"key.*0 bytes.*new-key"):
        read_key(tmp_path / "key")


def test_a_new_key_is_its_users_alone_and_replaces_nothing(tmp_path):
    path = tmp_path / "key"
    write_key(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(read_key(path)) == 32
    held = path.read_text()
    with pytest.raises(ConfigurationError, match="exists"):
        write_key(path)
    assert path.read_text() == held


def test_f78_a_config_shows_no_secret():
    given = {"directory": "d", "device": None, "memory": None, "disk": None, "codec": "raw", "block_tokens": 64}
    config = StoreConfig.parse(
        **given, remote="redis://:canary@host/0", salt="canary", strict=False, key=b"canary" * 6, environment={}
    )
    assert config.secrets
    assert "canary" not in repr(config)

"""Defects that are put into a copy of the package one at a time: each must make a named test fail."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Defect:
    """``old`` becomes ``new`` in ``file``; ``tests`` are what must notice, as pytest takes them."""

    name: str
    file: str
    old: str
    new: str
    tests: str


DEFECTS = (
    Defect("skip the digest", "codecs/safetensors_format.py", "    check_digest(blob)\n    return _assembled",
           "    return _assembled", "tests/faults/test_blobs.py -k hundred_thousand"),
    Defect("skip the key echo", "codecs/safetensors_format.py",
           "    claimed = BlockHeader.parse(blob)\n    if claimed.key != key:",
           "    claimed = BlockHeader.parse(blob)\n    if False:", "tests/faults/test_blobs.py -k f05_another"),
    Defect("believe the header's geometry", "codecs/safetensors_format.py",
           "if expected.render() != blanked(memoryview(blob)[:end]) or len(blob) != end + expected.data_bytes:",
           "if False:", "tests/unit/test_format.py -k fitting_digest"),
    Defect("believe the key a header states", "codecs/header.py", "        if not key.is_genuine():",
           "        if False:", "tests/faults/test_blobs.py -k f06"),
    Defect("let a lossy block call itself exact", "codecs/safetensors_format.py",
           "    if exact_only and claimed.lossy:", "    if False:", "tests/unit/test_format.py -k lossy_is_refused"),
    Defect("forget that an ancestor was lossy", "codecs/safetensors_format.py",
           "block.lossy or codec.lossy, model,", "codec.lossy, model,",
           "tests/faults/test_blobs.py -k f55"),
    Defect("accept a hole", "tiers/stack.py", "        return candidates[:hole]", "        return candidates",
           "tests/unit/test_stack.py -k hole"),
    Defect("16-bit keys", "keys.py",
           'struct.pack("<I", len(tokens) // TOKEN_BYTES) + tokens).digest()',
           'struct.pack("<I", len(tokens) // TOKEN_BYTES) + tokens).digest()[:2] + bytes(30)',
           "tests/unit/test_keys.py -k golden"),
    Defect("leave the parent out of the key", "keys.py", "domain + parent + struct", "domain + struct",
           "tests/unit/test_keys.py"),
    Defect("drop the salt", "adapters/base.py", '"salt": config.salt, "rope"', '"rope"',
           "tests/faults/test_blobs.py -k f74"),
    Defect("leave the weights out of the identity", "adapters/identity.py", '        "weights": weights,\n', "",
           "tests/parity/test_damage.py -k weights"),
    Defect("leave the rank out of the identity", "adapters/base.py",
           'self._known_fields["tensor_parallel"] = self.ranks.identity', "pass",
           "tests/parity/test_ranks.py -k rank_is_part"),
    Defect("leave no token to compute", "keys.py", "        return max(0, len(self) - 1)",
           "        return len(self)", "tests/unit/test_keys.py -k one_token"),
    Defect("one partial name for all", "stores/directory.py",
           "{folder}/.{os.getpid()}-{secrets.token_hex(8)}.partial", "{folder}/.1-0000000000000000.partial",
           "tests/contracts/test_contracts.py -k TestDirectoryStore"),
    Defect("give the name before the bytes", "stores/directory.py",
           '        partial = f"{folder}/.{os.getpid()}-{secrets.token_hex(8)}.partial"\n',
           "        partial = path\n", "tests/contracts/test_contracts.py -k TestDirectoryStore"),
    Defect("replace what stands", "stores/directory.py", "    if not replace:\n        try:", "    if False:\n        try:",
           "tests/contracts/test_contracts.py -k TestDirectoryStore"),
    Defect("overwrite other values under a key", "tiers/creating.py", "replace=replace):\n", "replace=True):\n",
           "tests/unit/test_creating.py -k f27"),
    Defect("follow symbolic links", "stores/directory.py", "| os.O_NOFOLLOW | os.O_NONBLOCK", "| os.O_NONBLOCK",
           "tests/unit/test_directory.py -k regular_file"),
    Defect("trust a directory of others", "stores/directory.py", "    if status.st_mode & _OTHERS_MAY_WRITE:",
           "    if False:", "tests/unit/test_directory.py -k others"),
    Defect("check by assert", "codecs/header.py", '        raise BlockError("corrupt", "the digest does not match the bytes")',
           '        assert False, "the digest does not match the bytes"', "tests/unit/test_public.py -k assert"),
    Defect("alias the RAM tier: hand out what the model goes on writing", "adapters/state.py",
           "name: tensor.clone() for name, tensor in state.items()", "name: tensor for name, tensor in state.items()",
           "tests/unit/test_snapshots.py -k writes_later"),
    Defect("show a prefix before all of it was verified", "serving.py", "    landing.commit(reached)",
           "    landing.commit(target)", "tests/parity/test_damage.py -k shortens"),
    Defect("wait for a store for ever", "tiers/deadline.py", "answers.get(timeout=timeout_seconds)", "answers.get()",
           "tests/unit/test_stack.py -k f40 --timeout 20"),
    Defect("never open the breaker", "tiers/breaker.py", "if self._failures >= FAILURES and", "if False and",
           "tests/unit/test_breaker.py"),
    Defect("let an error of ours out of generate", "hooks.py", "                abandon(path, error)",
           "                raise", "tests/faults/test_statements.py -k llama"),
    Defect("believe that an interrupted forward is running", "cache.py",
           "if self.in_forward and not _is_running(self._module()):", "if False:", "tests/faults/test_rows.py -k f53"),
    Defect("keep what an abandoned call put into the cache", "rescue.py",
           "if session.state.cut_to(base, held=session.past) != base:", "if False:",
           "tests/faults/test_statements.py -k llama"),
    Defect("ranks go by themselves", "adapters/ranks.py", "        return self._ranks.least(columns)[0]",
           "        self._ranks.least(columns)\n        return columns", "tests/parity/test_ranks.py -k least"),
    Defect("a rank that failed does not vote", "adapters/ranks.py", "        while self._cast < VOTES:", "        while False:",
           "tests/parity/test_ranks.py -k cold_on_all"),
    Defect("take a sealed value of another key", "stores/envelope.py", "bound = self._cipher(prefix, label), prefix + label",
           "bound = self._cipher(prefix, bytes(64)), prefix", "tests/unit/test_envelope.py"),
    Defect("use a salt twice", "stores/envelope.py", "os.urandom(SALT_BYTES)", "bytes(SALT_BYTES)",
           "tests/unit/test_envelope.py -k same_keys"),
    Defect("list a sealed value under any name", "stores/sealed.py", "return key if sealing.name(key) == name else None",
           "return key", "tests/unit/test_envelope.py -k f05"),
    Defect("leave names as they are", "stores/envelope.py", 'return f"{self.namespace(namespace)}/{hidden.hex()}"',
           "return key", "tests/unit/test_envelope.py -k say_nothing"),
    Defect("delete what others sealed", "tiers/creating.py", ', "memory", "sealed"})', ', "memory"})',
           "tests/parity/test_trust.py -k share_a_directory"),
    Defect("leave a forged value where it is", "tiers/encoded.py", '                    self.reject(key.store_key, "auth")\n',
           "", "tests/parity/test_trust.py -k f71"),
    Defect("show secrets in a config", "config.py", "field(default=(), repr=False)", "()",
           "tests/unit/test_keyring.py -k shows_no_secret"),
    Defect("keep a claim for ever", "tiers/stack.py", "            self._flights.land(capture.begun)", "            pass",
           "tests/parity/test_single_flight.py"),
)  # fmt: skip

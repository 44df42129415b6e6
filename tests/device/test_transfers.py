"""What goes through pinned memory is what went in, whatever its strides, its size and the stream that asks."""

from __future__ import annotations

import pytest
import torch
import xxhash

import ghostcacher
from ghostcacher import GhostCache, transfers
from ghostcacher.adapters.fingerprint import full_digest
from ghostcacher.testing.models import random_prompt, tiny_model
from ghostcacher.transfers import LEAST_BYTES, Sending, chunks, in_ram, on_device, staged

CPU = torch.device("cpu")
CUDA = torch.device("cuda")
TIERS = [
    {"device": "2GiB", "memory": None, "disk": None}, {"memory": "2GiB", "disk": None}, {"memory": None},
    {"memory": None, "codec": "raw.z"},
]  # fmt: skip


def tensor_of(values, device=CPU):
    return torch.arange(values, dtype=torch.int64, device=device).to(torch.int16)


@pytest.fixture(params=["pinned", "none to be had"])
def memory(request, monkeypatch):
    if request.param != "pinned":
        monkeypatch.setattr(transfers, "_pinned", lambda like: None)
    return request.param


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(transfers, "CHUNK_BYTES", LEAST_BYTES)
    return LEAST_BYTES


def test_in_ram_nothing_is_copied():
    tensor = tensor_of(LEAST_BYTES)
    assert in_ram(tensor) is tensor
    assert staged(tensor, CPU) is tensor
    assert on_device(tensor, CPU) is tensor
    [chunk] = chunks(tensor)
    assert bytes(chunk) == tensor.numpy().tobytes()
    sending = Sending()
    sending.sent(CPU)
    sending.settle()


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("values", [0, 1, LEAST_BYTES, 3 * LEAST_BYTES + 7])
def test_there_and_back_again(values, memory):
    tensor = tensor_of(values)
    there = on_device(tensor, CUDA)
    back = in_ram(there)
    assert (there.device.type, back.device.type, back.is_pinned()) == ("cuda", "cpu", False)
    assert torch.equal(back, tensor)


@pytest.mark.usefixtures("gpu")
def test_what_is_strided_arrives_packed(memory):
    wide = tensor_of(8 * LEAST_BYTES).view(8, 4, -1)
    assert torch.equal(in_ram(on_device(wide[2:7, :, 5:-3], CUDA)), wide[2:7, :, 5:-3])
    assert torch.equal(in_ram(wide.cuda()[:, 1:3].transpose(0, 1)), wide[:, 1:3].transpose(0, 1))


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("values", [0, 5, LEAST_BYTES // 2, LEAST_BYTES + 1, 2 * LEAST_BYTES, 7 * LEAST_BYTES // 2 + 3])
def test_a_digest_is_the_same_on_every_device(values, memory, small_chunks):
    tensor = tensor_of(values)
    pieces = xxhash.xxh3_128()
    for chunk in chunks(tensor.cuda()):
        pieces.update(chunk)
    assert pieces.digest() == xxhash.xxh3_128(tensor.numpy().tobytes()).digest()
    assert full_digest({"weight": tensor.cuda()}) == full_digest({"weight": tensor})


class Stream:
    """A GPU's, without one: what is copied has arrived when the event was waited for, and not before."""

    def __init__(self, monkeypatch):
        self.copies = []
        monkeypatch.setattr(transfers, "_is_worth_it", lambda tensor, gpu: tensor.nbytes > 0)
        monkeypatch.setattr(transfers, "_pinned", lambda like: Late(like, self))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self)

    def record_event(self):
        return Event(self.copies[-1])


class Late:
    def __init__(self, like, stream):
        self.memory, self.stream = torch.zeros_like(like), stream

    def __getitem__(self, cut):
        return Late.of(self.memory[cut], self.stream)

    @classmethod
    def of(cls, memory, stream):
        made = cls.__new__(cls)
        made.memory, made.stream = memory, stream
        return made

    def copy_(self, piece, *, non_blocking):
        self.stream.copies.append((self.memory, piece))

    def numpy(self):
        return self.memory.numpy()


class Event:
    def __init__(self, copy):
        self.copy = copy

    def synchronize(self):
        memory, piece = self.copy
        memory.copy_(piece)


@pytest.mark.parametrize("values", [0, 5, LEAST_BYTES // 2, LEAST_BYTES + 1, 2 * LEAST_BYTES, 7 * LEAST_BYTES // 2 + 3])
def test_pieces_are_waited_for_and_make_the_whole(values, small_chunks, monkeypatch):
    tensor = tensor_of(values)
    Stream(monkeypatch)
    found = [bytes(chunk) for chunk in chunks(tensor)]
    assert b"".join(found) == tensor.numpy().tobytes()
    assert len(found) == max(1, -(-tensor.nbytes // small_chunks))


@pytest.mark.usefixtures("gpu")
def test_no_more_than_a_few_copies_wait():
    sending = Sending()
    for _ in range(3 * transfers.UNDER_WAY):
        on_device(tensor_of(LEAST_BYTES), CUDA)
        sending.sent(CUDA)
        assert len(sending._events) <= transfers.UNDER_WAY
    sending.settle()
    assert not sending._events


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("tier", TIERS)
def test_streams_of_the_users_own_see_whole_state(tier, with_logits, tmp_path, memory):
    """Readers fill on their threads' streams, the model runs on another: nothing may run before it has arrived."""
    model = tiny_model("llama", num_hidden_layers=12, max_position_embeddings=8192).cuda()
    with ghostcacher.open_store(tmp_path, **tier) as store:
        for turn in range(6):
            prompt = random_prompt(3000, seed=turn).cuda()
            expected = with_logits(model, prompt, new=2)
            with torch.cuda.stream(torch.cuda.Stream()):
                with_logits(model, prompt[:, :2900], GhostCache(model, store), new=1)
                store.flush()
                cache = GhostCache(model, store)
                found = with_logits(model, prompt, cache, new=2)
            torch.cuda.synchronize()
            assert cache.report.cached_tokens >= 2900
            torch.testing.assert_close(found[1][0], expected[1][0], atol=1e-3, rtol=0)

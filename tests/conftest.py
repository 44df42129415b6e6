from __future__ import annotations

import importlib
import inspect
import os
import socket
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import pytest
import torch

import ghostcacher
from ghostcacher import gate
from ghostcacher.codecs import products
from ghostcacher.codecs.classes import Classes
from ghostcacher.codecs.symbols import SymbolCoder
from ghostcacher.testing import servers
from ghostcacher.testing.models import tiny_model

torch.set_num_threads(1)
BLOCK_TOKENS = 16
ROOT = Path(__file__).parents[1]


def pytest_addoption(parser):
    parser.addoption("--device", help="where models and prompts are, such as cuda; default: the CPU")


def pytest_configure(config):
    if device := config.getoption("--device"):
        torch.set_default_device(device)
        torch.backends.cudnn.allow_tf32 = False  # an image alone is what it is among others, and in any batch


@pytest.fixture
def gpu():
    """A GPU, or no such test: aloud. `.ci/run` has none; `python -m pytest tests/device` where there is one."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")


@pytest.fixture(scope="session")
def in_another_process():
    """A script run by an interpreter of its own, which finds the package: what it ended with and said."""

    def run(script, argument, *options, **variables):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), **variables}
        command = [sys.executable, *options, "-c", script, str(argument)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)

    return run


@pytest.fixture(scope="session")
def homes(tmp_path_factory):
    return tmp_path_factory.mktemp("homes")


@pytest.fixture(autouse=True)
def _own_home(homes, monkeypatch):
    """No test reads or writes the user's own store, or another test's."""
    monkeypatch.setenv("GHOSTCACHER_HOME", str(homes / uuid.uuid4().hex))
    monkeypatch.delenv("GHOSTCACHER_DISABLE", raising=False)


@pytest.fixture(autouse=True)
def _patient_gate(request, monkeypatch):
    """A tiny model computes faster than a busy machine reads: what is worth loading is for the tests of that."""
    if request.path.stem not in {"test_gate", "test_worth"}:
        monkeypatch.setattr(gate, "GRACE_SECONDS", 30.0)
        monkeypatch.setattr(gate, "GRACE_SHARE", float("inf"))


@pytest.fixture
def store(tmp_path):
    with ghostcacher.open_store(tmp_path / "store", memory=None, block_tokens=BLOCK_TOKENS) as opened:
        yield opened


@pytest.fixture
def memory_store():
    with ghostcacher.open_store(memory="64MiB", disk=None, block_tokens=BLOCK_TOKENS) as opened:
        yield opened


@pytest.fixture(scope="session")
def models():
    built = {}

    def get(model_type, **overrides):
        identity = (model_type, tuple(sorted(overrides.items())))
        if identity not in built:
            built[identity] = tiny_model(model_type, **overrides)
        return built[identity]

    return get


@pytest.fixture
def llama(models):
    return models("llama")


@pytest.fixture(scope="session")
def generate():
    """`model.generate` with the cache under the name that this transformers takes."""

    def run(model, ids, cache=None, *, new=8, **options):
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        taken = inspect.signature(base.forward).parameters
        name = next((name for name in ("cache", "past_key_values", "cache_params") if name in taken), "past_key_values")
        given = {} if cache is None else {name: cache}
        options.setdefault("do_sample", False)
        options.setdefault("attention_mask", torch.ones_like(ids))
        return model.generate(ids, max_new_tokens=new, **given, **options)

    return run


@pytest.fixture(scope="session")
def with_logits(generate):
    """Tokens and logits ``[steps, rows, vocabulary]`` of one run, after the same random seed."""

    def run(model, ids, cache=None, **options):
        torch.manual_seed(7)
        out = generate(model, ids, cache, output_logits=True, return_dict_in_generate=True, **options)
        return out.sequences, torch.stack(out.logits)

    return run


@pytest.fixture(scope="session")
def cold(with_logits):
    """`with_logits` without a cache, run once for all tests that ask for the same: nothing of ours is in it."""
    known = {}

    def run(model, ids, **options):
        given = tuple(
            (name, str(value.tolist() if torch.is_tensor(value) else value)) for name, value in options.items()
        )
        asked = (id(model), str(ids.tolist()), *sorted(given))
        if asked not in known:
            known[asked] = (model, with_logits(model, ids, None, **options))  # which keeps its id taken
        return known[asked][1]

    return run


@pytest.fixture(scope="session")
def s3_endpoint():
    """A real server that speaks S3, on loopback."""
    pytest.importorskip("moto.server", reason="S3 needs moto[server]; `make test` installs it")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(150):
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            break
        except OSError:
            time.sleep(0.2)
    yield f"http://127.0.0.1:{port}"
    server.kill()
    server.wait()


@pytest.fixture
def s3_bucket(s3_endpoint):
    s3fs = pytest.importorskip("s3fs")
    fs = s3fs.S3FileSystem(
        key="testing", secret="testing", client_kwargs={"endpoint_url": s3_endpoint}, skip_instance_cache=True
    )
    name = f"bucket-{uuid.uuid4()}"
    fs.mkdir(name)
    return name


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory):
    """A real server, or no test of Redis: aloud."""
    if servers.redis_binary() is None:
        pytest.skip("no redis-server: apt-get install redis-server")
    with servers.redis_server(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="session")
def redis_cluster(tmp_path_factory):
    """Three masters with a replica each."""
    if servers.redis_binary() is None:
        pytest.skip("no redis-server: apt-get install redis-server")
    with servers.redis_cluster(tmp_path_factory.mktemp("cluster")) as nodes:
        yield nodes


@pytest.fixture
def redis_url(redis_server):
    """An empty database."""
    redis = pytest.importorskip("redis")
    redis.Redis(port=redis_server.port).flushall()
    return redis_server.url


@pytest.fixture(scope="session")
def mooncake_pool(tmp_path_factory):
    """A real master and a process that holds the pool, or no test of Mooncake: aloud."""
    pytest.importorskip("mooncake", reason="Mooncake: pip install mooncake-transfer-engine-non-cuda")
    try:
        importlib.import_module("mooncake.store")
    except ImportError as error:
        pytest.skip(f"Mooncake's client does not load: {error}; apt-get install libibverbs1 librdmacm1 libnuma1")
    with servers.mooncake_pool(tmp_path_factory.mktemp("mooncake")) as pool:
        yield pool


@pytest.fixture(autouse=True)
def _no_stray_threads():
    yield
    names = [
        thread.name for thread in threading.enumerate() if not thread.daemon and thread is not threading.main_thread()
    ]
    assert not [name for name in names if name.startswith("ghostcacher-w")], names


os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def sums_with_outliers():
    """What `kvt` multiplies on a device, small codes and outliers, and what it must be."""

    def compute(device):
        generator = torch.Generator().manual_seed(0)
        basis = torch.randint(-127, 128, (3, 32, 32), generator=generator).to(torch.int8)
        codes = torch.randint(-127, 128, (3, 32, 64), generator=generator).float()
        codes[0, 3, 7], codes[2, 0, 63], codes[1, 5, :4] = 100_000, -40_000, 128
        coder = SymbolCoder("x", 3, 32, 64, Classes(torch.zeros((3, 32), dtype=torch.uint8)))
        unpacked = []
        coder.unpack(coder.pack(codes), unpacked.append)
        [found] = unpacked
        small, rest = found.in_int8()
        sums = torch.empty((3, 64, 32), device=device)
        products.product(small.view(3, 32, 64).to(device), basis.to(device), sums)
        products.add_outliers(sums, basis.to(device), rest)
        return sums.cpu(), torch.einsum("lwt,lwc->ltc", codes.double(), basis.double()).float()

    return compute

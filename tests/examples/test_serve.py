"""The example service: right answers for many at once, in batches, and clear refusals, as its own process on the loopback."""
import asyncio
import importlib.util
import io
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from PIL import Image

from zoo.predicting.classification import predict
from zoo.predicting.exported import ExportedNetwork, exported_info
from zoo.reading.digits import Digits

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    for i, picture in enumerate(Digits("val", size=48, mode="RGB", limit=12).images):
        picture.save(folder / f"{i:02d}.png")
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def service(classifier):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "uvicorn", "--app-dir", "examples", "serve:app", "--port", str(port), "--log-level", "warning"]
    environment = os.environ | {"ZOO_MODEL": str(classifier), "ZOO_MAX_PIXELS": "1000000", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=ROOT, env=environment)
    url, end = f"http://127.0.0.1:{port}", time.monotonic() + 120
    try:
        while True:
            try:
                httpx.get(url)
                break
            except httpx.ConnectError:
                assert process.poll() is None and time.monotonic() < end, "the service does not start"
                time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait(timeout=60)


def load():
    spec = importlib.util.spec_from_file_location("load", ROOT / "examples" / "load.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.load


def test_many_at_once_get_their_own_answers(service, classifier, pictures):
    answers, _, _ = asyncio.run(load()(f"{service}/classes?top=3", [path.read_bytes() for path in pictures], requests=240, at_once=48))
    network = ExportedNetwork(classifier)
    expected = [prediction.classes for prediction in predict(network, exported_info(network), pictures, top=3)]
    for i, answer in enumerate(answers):
        assert answer.status_code == 200, answer.text
        for given, (name, probability) in zip(answer.json(), expected[i % len(pictures)], strict=True):
            assert given["class"] == name and given["probability"] == pytest.approx(probability, abs=1e-5)
    assert len({classes[0][0] for classes in expected}) > 2  # pictures that differ


def png(size: tuple[int, int]) -> bytes:
    file = io.BytesIO()
    Image.new("L", size).save(file, "png")
    return file.getvalue()


@pytest.mark.parametrize(("body", "status", "says"), [
    (b"no picture", 422, "the picture is not a picture that can be read"),
    (b"", 422, "the picture is not a picture that can be read"),
    (png((64, 64))[:-30], 422, "the picture cannot be read: image file is truncated"),
    (png((2000, 2000)), 422, "it has 4000000 pixels, and ZOO_MAX_PIXELS=1000000"),
    (bytes(10_000_001), 413, "the picture has more than 10000000 bytes"),
], ids=["text", "nothing", "cut off", "too many pixels", "too many bytes"])
def test_what_cannot_be_used_is_refused_in_words(service, body, status, says):
    answer = httpx.post(f"{service}/classes", content=body, timeout=60)
    assert answer.status_code == status and says in answer.json()["detail"]
    assert httpx.post(f"{service}/classes", content=png((40, 40)), timeout=60).status_code == 200  # and the service goes on

"""Scenes of digits: measured results hang on every pixel of them."""
from hashlib import sha256

import numpy as np
import pytest

from zoo.errors import InputError
from zoo.reading.digits import Digits, colourful_scene, grey_scene


@pytest.fixture(scope="module")
def held_out() -> Digits:
    return Digits("val")


def test_grey_scenes_are_these(held_out):
    hashed = sha256()
    for i in range(20):
        picture, labels = grey_scene(held_out, 64, np.random.default_rng((True, i)))
        assert picture.dtype == np.float64 and labels.dtype == np.uint8 and picture.min() >= 0 and picture.max() <= 1
        hashed.update((picture * 255).round().astype(np.uint8).tobytes() + labels.tobytes())
    assert hashed.hexdigest() == "9e599df2042ae52fb6c742bd7a10b53c3fd48575604a5d4487fa9e8c06c9ec0a"


def test_colourful_scenes_are_these(held_out):
    hashed = sha256()
    for i in range(20):
        scene = colourful_scene(held_out, 96, np.random.default_rng((0, 1, i)))
        assert not np.sum(scene.masks, 0).max() > 1 and 1 <= len(scene.labels) <= 4
        hashed.update(scene.picture.tobytes() + scene.label_map.tobytes())
    assert hashed.hexdigest() == "bad8534656157b4cb361e672083d904370aedf73a838cf4c4f1d1434e4f9b06f"


@pytest.mark.parametrize(("arguments", "message"), [(("test",), "split='test': it is"), (("val", 32, "CMYK"), "mode='CMYK': it is")])
def test_unknown_parts_and_modes(arguments, message):
    with pytest.raises(InputError, match=message):
        Digits(*arguments)

import numpy as np
import pytest
from PIL import Image

from zoo.errors import InputError


@pytest.fixture(scope="module")
def main(load_tool):
    return load_tool("visualize").main


def test_writes_pictures_and_the_page(main, tmp_path, capsys):
    Image.fromarray(np.full((40, 60, 3), 99, np.uint8)).save(tmp_path / "grey.png")
    assert main(["sknet_nano", str(tmp_path / "grey.png"), "-o", str(tmp_path / "seen"), "--attributions", "gradcam"]) == 0
    assert "wrote 5 pictures and" in capsys.readouterr().out
    assert len(list((tmp_path / "seen").glob("*.png"))) == 5 and (tmp_path / "seen" / "index.html").stat().st_size > 10_000


def test_nothing_is_left_after_an_error(main, tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "black.png")
    with pytest.raises(InputError, match="no attribution 'cam'"):
        main(["sknet_nano", str(tmp_path / "black.png"), "-o", str(tmp_path / "seen"), "--attributions", "cam"])
    assert not (tmp_path / "seen").exists()

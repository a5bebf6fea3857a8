"""The main job as a stranger sees it, whole: at least 97 % of the held-out digits, and safe to repeat."""
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]


def demo(work_dir: Path) -> dict[str, str]:
    done = subprocess.run([sys.executable, "-m", "zoo", "demo", "--work-dir", work_dir], capture_output=True, text=True,
                          cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return dict(re.findall(r"^(\S.*?)  +(\S.*)$", done.stdout.rsplit("\n\n", 1)[1], re.M))


@pytest.mark.long
def test_demo_trains_exports_compares_and_pictures(tmp_path):
    table = demo(tmp_path / "demo")
    assert float(table["accuracy on 360 held-out digits"].removesuffix(" %")) >= 97
    difference, sizes = re.match(r"largest difference (\S+), (.*)", table["ONNX Runtime against PyTorch"]).groups()
    assert float(difference) <= 1e-4 and "any height and width" in sizes
    checkpoint = Path(table["checkpoint"])
    written = checkpoint.stat().st_mtime_ns
    assert Path(table["ONNX file"]).is_file()
    with Image.open(table["picture of predictions"]) as picture:
        assert min(picture.size) > 500
    again = demo(tmp_path / "demo")
    assert again["accuracy on 360 held-out digits"] == table["accuracy on 360 held-out digits"]
    assert checkpoint.stat().st_mtime_ns == written, "the second run trained again"

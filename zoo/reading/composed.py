"""Objects on photographs, with exact masks: scikit-learn's digits on pictures that scikit-learn and scikit-image ship."""
import numpy as np
from PIL import Image

from zoo.errors import require
from zoo.reading.digits import Digits
from zoo.reading.masks import check_split

# What the packages hold themselves, nothing of it downloaded; by the package, what training sees and what is held out.
PHOTOGRAPHS = {"train": (("sklearn", "china.jpg"), ("skimage", "chelsea"), ("skimage", "rocket"), ("skimage", "hubble_deep_field")),
               "val": (("sklearn", "flower.jpg"), ("skimage", "astronaut"), ("skimage", "coffee"))}
SHARES = (0.35, 0.75)  # of the scene's side, that a digit's side is
TURN = 25  # degrees, at most
CUT = (0.25, 0.8)  # of a photograph's shorter side, that is shown


class PhotographScenes:
    """A handwritten digit of any colour, turned and scaled, at any place on a part of a photograph.

    The picture is ink · colour + (1 - ink) · photograph, and the mask is where ink covers at least half. Scene i is a pure function of
    (split, i); neither digits nor photographs of one split are in the other.

    Args:
        split: "train" or "val".
        size: pixels on a side.

    Raises InputError for another split, and without scikit-learn or scikit-image.
    """

    def __init__(self, split: str, size: int = 96):
        check_split(split)
        require("scenes on photographs", "train", "sklearn", "skimage")
        from skimage import data
        from sklearn.datasets import load_sample_image
        self.split, self.size, self.digits = split, size, Digits(split, 64)
        arrays = (load_sample_image(name) if package == "sklearn" else getattr(data, name)() for package, name in PHOTOGRAPHS[split])
        self.photographs = [Image.fromarray(np.asarray(pixels)[..., :3]) for pixels in arrays]

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """The picture (size, size, 3) uint8 and the mask (size, size) bool."""
        random = np.random.default_rng((self.split == "val", index))
        photograph = self.photographs[random.integers(len(self.photographs))]
        side = int(min(photograph.size) * random.uniform(*CUT))
        left, top = (int(random.integers(0, whole - side + 1)) for whole in photograph.size)
        ground = photograph.resize((self.size, self.size), Image.Resampling.BILINEAR, (left, top, left + side, top + side))
        digit, _ = self.digits.draw(random)
        part = int(self.size * random.uniform(*SHARES))
        digit = digit.rotate(float(random.uniform(-TURN, TURN)), Image.Resampling.BILINEAR).resize((part, part), Image.Resampling.BILINEAR)
        ink = np.zeros((self.size, self.size))
        row, column = random.integers(0, self.size - part + 1, 2)
        ink[row : row + part, column : column + part] = np.clip(np.asarray(digit) / 255 * 1.6, 0, 1)
        colour = random.uniform(0, 255, 3)
        picture = ink[..., None] * colour + (1 - ink[..., None]) * np.asarray(ground)
        return np.rint(picture).astype(np.uint8), ink >= 0.5

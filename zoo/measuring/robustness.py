"""What the corruptions of ImageNet-C (arXiv 1903.12261) cost a model: errors, the mean corruption error, a report with curves."""
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from zoo.errors import InputError
from zoo.files import make_folder, replacing
from zoo.reading.corruptions import CORRUPTIONS, SEVERITIES

# Per corruption, AlexNet's error in per cent on ImageNet-C, the mean over severities: what the paper divides by. Six digits of them
# are in the code of AugMix (google-research/augmix, imagenet.py), which takes them from the paper's (hendrycks/robustness).
ALEXNET = {
    "gaussian_noise": 88.6428, "shot_noise": 89.4468, "impulse_noise": 92.2640, "defocus_blur": 81.9880, "glass_blur": 82.6268,
    "motion_blur": 78.5948, "zoom_blur": 79.8360, "snow": 86.6816, "frost": 82.6572, "fog": 81.9324, "brightness": 56.4592,
    "contrast": 85.3204, "elastic_transform": 64.6056, "pixelate": 71.7840, "jpeg_compression": 60.6500,
}


@dataclass(frozen=True)
class Robustness:
    """Errors in per cent: of clean images, and by corruption at severities 1 to 5."""

    clean: float
    errors: Mapping[str, Sequence[float]]

    @property
    def mean_error(self) -> float:
        """The mean over corruptions and severities."""
        return float(np.mean(list(self.errors.values())))

    def mean_corruption_error(self, baseline: Mapping[str, float]) -> float:
        """mCE in per cent: the mean over corruptions of Σ_s error_s / Σ_s error_s of the baseline, given as means over severities."""
        return float(np.mean([100 * np.mean(errors) / baseline[name] for name, errors in self.errors.items()]))


def read_baseline(path: str | Path) -> dict[str, float]:
    """A baseline's errors, means over severities, from what `write_report` wrote."""
    try:
        return {name: float(np.mean(errors)) for name, errors in json.loads(Path(path).read_text())["errors"].items()}
    except OSError as error:
        raise InputError(f"cannot read the baseline {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is not a corruptions.json of `zoo test`: {error}") from error


def check_baseline(baseline: Mapping[str, float]) -> None:
    """Raises InputError unless there is an error above zero for every corruption."""
    for name in CORRUPTIONS:
        if not baseline.get(name, 0) > 0:
            raise InputError(f"the baseline has no error for {name}; a mean corruption error cannot be relative to it")


def write_report(found: Robustness, folder: str | Path, baseline: Mapping[str, float] | None) -> list[Path]:
    """Writes `folder`/corruptions.json and the curves, corruptions.png; the baseline's means are dashed lines in them."""
    folder = Path(folder)
    make_folder(folder)
    numbers, curves = folder / "corruptions.json", folder / "corruptions.png"
    with replacing(numbers) as written:
        written.write_text(json.dumps(asdict(found), indent=1) + "\n")
    with replacing(curves) as written:
        _draw(found, baseline).savefig(written, dpi=120)
    return [numbers, curves]


def _draw(found: Robustness, baseline: Mapping[str, float] | None):
    from matplotlib.figure import Figure
    figure = Figure(figsize=(12, 7), layout="constrained")
    axes = figure.subplots(3, 5, sharex=True, sharey=True)
    for place, (name, errors) in zip(axes.flat, found.errors.items(), strict=True):
        place.axhline(found.clean, color="grey", linewidth=0.8)
        if baseline is not None:
            place.axhline(baseline[name], color="tab:orange", linestyle="--", linewidth=1)
        place.plot(SEVERITIES, errors, marker="o", markersize=3)
        place.set_title(name.replace("_", " "), fontsize=9)
    axes[0, 0].set(ylim=(0, 100), xticks=SEVERITIES)
    figure.supxlabel("severity")
    figure.supylabel("error, %   (grey: clean" + (", dashed: baseline, mean over severities)" if baseline is not None else ")"))
    return figure

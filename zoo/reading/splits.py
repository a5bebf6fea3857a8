"""Samples divided for training and validation: with equal shares of the classes, and never a file on both sides of its copy."""
import hashlib
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path

import numpy as np

from zoo.errors import InputError, require


def identical_files(paths: Sequence[Path]) -> list[int]:
    """A number for each of `paths`, the same for files of the same bytes. Only files of one size are read."""
    sizes = [path.stat().st_size for path in paths]
    shared = Counter(sizes)
    contents = [(size, hashlib.sha256(path.read_bytes()).digest() if shared[size] > 1 else place)
                for place, (path, size) in enumerate(zip(paths, sizes, strict=True))]
    numbers: dict[tuple, int] = {}
    return [numbers.setdefault(content, len(numbers)) for content in contents]


def held_out(labels: Sequence[Iterable[int]], groups: Sequence[Hashable], folds: int, fold: int, seed: int = 0) -> list[bool]:
    """Which samples are the validation part of one of `folds` divisions, in each of which every sample is held out once.

    A function of the arguments alone.

    Args:
        labels: of each sample the classes that are in it. The rarest of them is the one whose shares are kept equal.
        groups: something for each sample; samples of the same stay together.
        folds: 2 or more; the held-out part is about 1 / folds of the samples.
        fold: which of them is held out, from 0.

    Raises InputError for a fold that is none of the folds, and for fewer groups than folds.
    """
    if folds < 2 or not 0 <= fold < folds:
        raise InputError(f"fold {fold} of {folds} folds: there are 2 folds or more, and they are counted from 0")
    different = len(set(groups))
    if different < folds:
        raise InputError(f"{different} different samples cannot be divided into {folds} folds; name fewer with --folds, or add data")
    require("dividing data", "train", "sklearn")
    from sklearn.model_selection import StratifiedKFold

    counts = Counter(label for present in labels for label in set(present))
    rarest = {group: min(set(present), key=lambda label: (counts[label], label), default=-1)
              for group, present in zip(reversed(groups), reversed(labels), strict=True)}  # of a group, of its first sample
    sizes = Counter(rarest.values())
    commonest = sizes.most_common(1)[0][0]
    strata = [label if sizes[label] >= folds else commonest for label in rarest.values()]  # too few to have equal shares
    parts = list(StratifiedKFold(folds, shuffle=True, random_state=seed).split(np.zeros(different), strata))
    names = list(rarest)
    chosen = {names[place] for place in parts[fold][1]}
    return [group in chosen for group in groups]

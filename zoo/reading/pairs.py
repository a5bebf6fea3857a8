"""Which mask belongs to which picture or volume, by their names."""
import itertools
import logging
import re
from collections.abc import Iterable, Sequence
from os.path import commonprefix
from pathlib import Path
from typing import NamedTuple

from zoo.errors import InputError, first_few

LOG = logging.getLogger("zoo")
SUFFIX = re.compile(r"\.(bmp|gif|jpe?g|pgm|png|ppm|tiff?|webp|nii|gz|mgz|mgh|hdr|img)$", re.IGNORECASE)
TOKEN = re.compile(r"\d+|[A-Z]?[a-z]+|[A-Z]+|.")  # numbers and words, which are never cut, and every other character
LONGEST = 12  # tokens before and after what tells names apart
SHOWN = 3  # names in a sentence


class Name(NamedTuple):
    """Of a file: its folder below that of the whole list, and the words, numbers and characters of its name without the suffix."""

    folder: str
    tokens: tuple[str, ...]

    def folded(self) -> "Name":
        return Name(self.folder.casefold(), tuple(token.casefold() for token in self.tokens))


def pair(pictures: Iterable[Path], masks: Iterable[Path], picture_folder: str | Path, mask_folder: str | Path) -> list[tuple[Path, Path]]:
    """Each of `pictures`, which lie below `picture_folder`, with the one of `masks`, below `mask_folder`, that has its name.

    Sub-folders are part of a name; suffixes are not, nor is letter case, unless names of a list differ by nothing else. Where no name
    is in both lists, a beginning and an end that all pictures share, and such of all masks, do not count: `img_1.jpg` and
    `img_1_mask.png`, `img_7.jpg` and `gt_7.png`, `ct_0000.nii.gz` and `ct.nii.gz`, `a.jpg` and `a.jpg.png` are pairs. They are whole
    words and numbers, and where both have numbers, the same: `img_1` is no partner of `img_10_mask` or `img_2_mask`. What did not
    count is said in the log `zoo`. The order is that of `pictures`. Volumes are paired as pictures are.

    Raises InputError, naming them, for files without a partner, for two of one list with one name, and for no files at all.
    """
    pictures, masks = list(pictures), list(masks)
    if not pictures or not masks:
        what, folder = ("masks", mask_folder) if pictures else ("pictures", picture_folder)
        raise InputError(f"there are no {what} below {folder}, where pairs of a picture and a mask are needed")
    names = [[_name(file, folder) for file in files] for files, folder in ((pictures, picture_folder), (masks, mask_folder))]
    folded = [[name.folded() for name in listed] for listed in names]
    if all(len(set(listed)) == len(set(as_they_are)) for listed, as_they_are in zip(folded, names, strict=True)):
        names = folded
    for files, listed in zip((pictures, masks), names, strict=True):
        _check_apart(files, listed)
    partners = _partners(*names)
    alone = [picture for picture, partner in zip(pictures, partners, strict=True) if partner is None]
    taken = set(partners)
    left = [mask for place, mask in enumerate(masks) if place not in taken]
    if alone or left:
        parts = [f"{_shown(files, folder)} of the {kind} below {folder} has no {partner}" for files, folder, kind, partner in (
            (alone, picture_folder, f"{len(pictures)} pictures", f"mask below {mask_folder}"),
            (left, mask_folder, f"{len(masks)} masks", f"picture below {picture_folder}")) if files]
        raise InputError(f"{'; '.join(parts)}; a mask is called as its picture, or as all masks are before or after that, for example "
                         "x_mask.png for x.jpg, and lies in the same sub-folder")
    return [(picture, masks[partner]) for picture, partner in zip(pictures, partners, strict=True) if partner is not None]


def _name(file: Path, folder: str | Path) -> Name:
    below = file.relative_to(folder)
    stem = below.name
    while shorter := SUFFIX.sub("", stem):
        if shorter == stem:
            break
        stem = shorter
    return Name(below.parent.as_posix(), tuple(TOKEN.findall(stem)))


def _check_apart(files: Sequence[Path], names: Sequence[Name]) -> None:
    first: dict[Name, Path] = {}
    for file, name in zip(files, names, strict=True):
        if name in first:
            raise InputError(f"{first[name]} and {file} have one name, and nothing says which of them is the partner of another file")
        first[name] = file


def _partners(pictures: Sequence[Name], masks: Sequence[Name]) -> list[int | None]:
    """The place of every picture's mask. The rule that leaves out nothing decides if it finds any, then the one that finds most."""
    candidates = [[(cut, [_left(name, cut) for name in listed], _numbers(listed[0], cut)) for cut in _cuts(listed)]
                  for listed in (pictures, masks)]
    found: list[int | None] = [None] * len(pictures)
    most, rule = 0, ((0, 0), (0, 0))
    places = {cut: {key: place for place, key in enumerate(keys) if key is not None} for cut, keys, _ in candidates[1]}
    for mine, theirs in sorted(itertools.product(*candidates), key=lambda two: sum(two[0][0]) + sum(two[1][0])):
        (cut, keys, numbers), (their_cut, _, their_numbers) = mine, theirs
        if numbers and their_numbers and numbers != their_numbers:
            continue
        partners = [None if key is None else places[their_cut].get(key) for key in keys]
        if (count := sum(partner is not None for partner in partners)) > most:
            found, most, rule = partners, count, (cut, their_cut)
        if most == len(pictures) or (most and not any(cut + their_cut)):
            break
    if any(map(any, rule)):
        shown = ["…".join(("".join(listed[0].tokens[:before]), "".join(listed[0].tokens[len(listed[0].tokens) - after:])))
                 for listed, (before, after) in zip((pictures, masks), rule, strict=True)]
        LOG.info("pictures called %s are paired with masks called %s", *shown)
    return found


def _cuts(names: Sequence[Name]) -> list[tuple[int, int]]:
    """How many tokens can be left out before and after: those that all names share."""
    before = len(commonprefix([name.tokens for name in names]))
    after = len(commonprefix([name.tokens[::-1] for name in names]))
    return list(itertools.product(range(min(before, LONGEST) + 1), range(min(after, LONGEST) + 1)))


def _left(name: Name, cut: tuple[int, int]) -> tuple[str, str] | None:
    """The folder and what remains of the name; None if that tells nothing."""
    before, after = cut
    rest = "".join(name.tokens[before:max(before, len(name.tokens) - after)])
    return (name.folder, rest) if any(map(str.isalnum, rest)) or name.folder != "." or not any(cut) else None


def _numbers(name: Name, cut: tuple[int, int]) -> list[int]:
    before, after = cut
    return [int(token) for token in (*name.tokens[:before], *name.tokens[len(name.tokens) - after:]) if token.isdecimal()]


def _shown(files: Sequence[Path], folder: str | Path) -> str:
    return first_few((file.relative_to(folder) for file in files), SHOWN)

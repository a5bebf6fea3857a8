"""Names of classes in two places: a network knows them by their order only."""
from collections.abc import Sequence

from zoo.errors import InputError, first_few, near_misses


def check_same_classes(given: Sequence[object], of: str, known: Sequence[object], of_known: str) -> None:
    """Raises InputError unless both lists hold the same names in the same order; `of` and `of_known` say in words whose they are."""
    names, expected = list(map(str, given)), list(map(str, known))
    if names == expected:
        return
    if sorted(names) == sorted(expected):
        place = next(place for place, (name, other) in enumerate(zip(names, expected, strict=True)) if name != other)
        raise InputError(f"{of} and {of_known} have the same classes in another order: number {place} is {names[place]!r} there and "
                         f"{expected[place]!r} here, so that names would be taken for each other")
    extra, missing = ([name for name in these if name not in those] for these, those in ((names, expected), (expected, names)))
    differences = [f"only {whose} {'have' if whose.endswith('data') else 'has'} {shown(these)}"
                   for whose, these in ((of, extra), (of_known, missing)) if these]
    near = near_misses(extra[0], missing) if extra and missing else ""
    raise InputError(f"{of} and {of_known} do not have the same classes, {len(names)} and {len(expected)}: "
                     f"{' and '.join(differences) or 'one of them repeats some'}{near}")


def shown(names: Sequence[object]) -> str:
    """Names in quotes as sentences have them."""
    return first_few(map(repr, names))

"""A sheet of samples of somebody's data with what is known about them, on which misread labels can be seen."""
import itertools
from collections.abc import Iterator

from PIL import Image

from zoo.predicting.sheets import TILE, annotate, contact_sheet
from zoo.reading.own_data import OwnData, Sample
from zoo.reading.pictures import open_picture

SHOWN = 25


def sample_sheet(data: OwnData, shown: int = SHOWN) -> Image.Image:
    """Samples to train on, of every class in turn, as pictures with their labels."""
    return contact_sheet([_tile(data, sample) for sample in itertools.islice(_in_turn(data), shown)])


def _in_turn(data: OwnData) -> Iterator[Sample]:
    """Each of the samples once: the first of every class, then the second, …"""
    of_class: list[list[Sample]] = [[] for _ in data.classes]
    for sample in data.splits["train"]:
        for label in set(sample.labels):
            of_class[label].append(sample)
    met = set()
    for sample in itertools.chain.from_iterable(itertools.zip_longest(*of_class)):
        if sample is not None and sample.path not in met:
            met.add(sample.path)
            yield sample


def _tile(data: OwnData, sample: Sample) -> Image.Image:
    picture = open_picture(sample.path)
    picture.thumbnail((TILE, TILE))
    return annotate(picture, [data.classes[sample.labels[0]], sample.path.name[-24:]], ["black", "gray"])

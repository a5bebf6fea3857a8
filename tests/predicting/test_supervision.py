"""Detections of supervision: the same from what was found in memory and from the file that is written of it."""
from pathlib import Path

import numpy as np
import pytest
import supervision as sv
from PIL import Image

from zoo.errors import InputError
from zoo.predicting.label_maps import Labelled
from zoo.predicting.scenes import FoundAnswers, Scene, SceneInfo
from zoo.predicting.supervision import map_detections, read_detections, scene_detections

INFO = SceneInfo("mmdet", ("cat", "dog", "cow"), np.zeros((3, 3), np.uint8), [], (7, 3, 90))


def scene(path: Path, masks: bool) -> Scene:
    Image.new("RGB", (40, 30)).save(path)
    inks = np.zeros((2, 30, 40), bool)
    inks[0, 5:20, 3:9] = inks[1, 1, 30:] = True
    return Scene(path, np.array([2, 0]), np.array([0.75, 0.5]), np.array([[3.0, 5, 9, 20], [30, 1, 40, 2.5]]), inks if masks else None)


@pytest.mark.parametrize("masks", [True, False])
def test_instances(tmp_path, masks):
    if masks:
        pytest.importorskip("pycocotools", reason="needs mmdetection and mmsegmentation: make mm")
    nothing = Scene(tmp_path / "c.png", np.zeros(0, int), np.zeros(0), np.zeros((0, 4)), np.zeros((0, 30, 40), bool) if masks else None)
    scenes = [scene(tmp_path / "a.png", masks), scene(tmp_path / "b.png", masks), nothing]
    answers = FoundAnswers([each.path for each in scenes], tmp_path / "answers.json", INFO)
    for each in scenes:
        answers.add(each)
    path, = answers.close()
    read = read_detections(path)
    assert list(read) == [scenes[0].path, scenes[1].path] and len(scene_detections(nothing, INFO)) == 0
    for each in scenes[:2]:
        found = scene_detections(each, INFO)
        assert found == read[each.path]
        assert found.class_id.tolist() == [90, 7] and found.data["class_name"].tolist() == ["cow", "cat"]
        assert (found.mask is not None) == masks and found[found.confidence > 0.6].area.tolist() == [90.0]
    assert len(sv.Detections.merge(list(read.values()))) == 4


def test_masks_of_classes(tmp_path):
    labels = np.zeros((6, 8), np.uint8)
    labels[1:3, 2:5] = 2
    for found in (map_detections(Labelled(tmp_path, labels, INFO.classes)), scene_detections(Scene(tmp_path, classes=labels), INFO)):
        assert found.class_id.tolist() == [0, 2] and found.data["class_name"].tolist() == ["cat", "cow"]
        assert found.xyxy.tolist() == [[0, 0, 8, 6], [2, 1, 5, 3]] and np.array_equal(found.mask[1], labels == 2)


@pytest.mark.parametrize(("text", "says"), [
    (None, "cannot read .*No such file"), ("{", "holds no boxes as"), ('[{"picture": "a.png"}]', "holds no boxes as"),
    ("[1]", "holds no boxes"),
])
def test_other_files_are_refused(tmp_path, text, says):
    if text is not None:
        (tmp_path / "answers.json").write_text(text)
    with pytest.raises(InputError, match=says):
        read_detections(tmp_path / "answers.json")

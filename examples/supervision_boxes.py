"""What a detector of zoo finds, as supervision's detections: drawn, counted and filtered by it.

    python examples/supervision_boxes.py work_dirs/boxes/epoch_6.pth data/digits/images/val drawn/
"""
import sys
from pathlib import Path

import numpy as np
import supervision as sv

from zoo.mm.downstream import load_scene_model, predict_scenes
from zoo.predicting.supervision import scene_detections
from zoo.reading.pictures import find_pictures, open_picture

checkpoint, folder, drawn = map(Path, sys.argv[1:])
drawn.mkdir(parents=True, exist_ok=True)
model, info = load_scene_model(checkpoint)
found = {}
for scene in predict_scenes(model, info, find_pictures([folder]), threshold=0.3):
    detections = scene_detections(scene, info)
    picture = sv.BoxAnnotator().annotate(open_picture(scene.path), detections)
    sv.LabelAnnotator().annotate(picture, detections).save(drawn / scene.path.name)
    found[scene.path] = detections
boxes = sv.Detections.merge(list(found.values()))
print(f"{len(boxes)} objects in {len(found)} pictures: {', '.join(np.unique(boxes.data['class_name']))}")

"""A network of zoo, or any of timm, as the whole backbone of an Ultralytics YOLO, finding the ends of digits."""
from pathlib import Path

from ultralytics import YOLO

import zoo.yolo  # noqa: F401  adds zoo's names to Ultralytics'
from zoo.reading.digits import write_digit_scenes

Path("yolo11n-mine-pose.yaml").write_text("""
nc: 10
kpt_shape: [4, 3]
backbone:
  - [-1, 1, biformer_nano, {drop_path_rate: 0.1}]
  - [0, 1, FeatureMap, [1]]     # of its maps at strides 4, 8, 16 and 32 the second
  - [0, 1, FeatureMap, [2]]
  - [0, 1, FeatureMap, [3]]
head:
  - [[1, 2, 3], 1, Pose, [nc, kpt_shape]]
""")
write_digit_scenes("digits", train=16, val=4, layout="yolo")
model = YOLO("yolo11n-mine-pose.yaml")
model.train(data="digits/digits-pose.yaml", epochs=1, batch=8, imgsz=96, workers=0, device="cpu", plots=False)
points = model("digits/images/val/000000.png", imgsz=96, conf=0.001)[0].keypoints
print(f"key points of {len(points)} digits")

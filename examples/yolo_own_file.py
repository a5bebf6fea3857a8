"""A model file of one's own for Ultralytics YOLO, with layers of zoo by name, that cuts out digits."""
from pathlib import Path

from ultralytics import YOLO

import zoo.yolo  # noqa: F401  adds zoo's names to Ultralytics'
from zoo.reading.digits import write_digit_scenes

Path("yolo11n-own-seg.yaml").write_text("""
nc: 10
scales: {n: [0.5, 0.25, 1024], s: [0.5, 0.5, 1024]}
backbone:
  - [-1, 1, Conv, [64, 3, 4]]                                     # 0, stride 4
  - [-1, 2, C3k2+DAS, [256, True]]                                # 1: after the sums inside
  - [-1, 1, DeformableTokenMerging, [512]]                        # 2, stride 8: its width, scaled like Conv's
  - [-1, 1, BiLevelRoutingAttention, {topk: 4, num_heads: 4}]     # 3: of the width before it
  - [-1, 1, Conv, [512, 3, 2]]                                    # 4, stride 16
head:
  - [[3, 4], 1, AttentionGate, []]                                # 5: a map, and the coarser one that asks
  - [[5, 4], 1, Segment, [nc, 32, 256]]
""")
write_digit_scenes("digits", train=16, val=4, layout="yolo")
model = YOLO("yolo11n-own-seg.yaml")
model.train(data="digits/digits.yaml", epochs=1, batch=8, imgsz=96, workers=0, device="cpu", plots=False)
masks = model("digits/images/val/000000.png", imgsz=96, conf=0.001)[0].masks
print(f"{0 if masks is None else len(masks)} digits cut out")

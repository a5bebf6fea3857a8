"""A ready model file of Ultralytics YOLO with a mechanism of zoo, trained on scenes of digits, evaluated and exported."""
from ultralytics import YOLO

import zoo.yolo  # noqa: F401  adds zoo's names to Ultralytics'
from zoo.reading.digits import write_digit_scenes

write_digit_scenes("digits", train=32, val=8, layout="yolo")  # or: zoo prepare-digits digits --format yolo
settings = dict(data="digits/digits.yaml", imgsz=96, workers=0, device="cpu", fliplr=0.0, plots=False)
model = YOLO("yolo11n-das.yaml")
model.train(epochs=2, batch=8, **settings)
metrics = model.val(**settings)
file = model.export(format="onnx", dynamic=True, simplify=False, imgsz=96)
found = YOLO(file, task="detect").predict("digits/images/val/000000.png", imgsz=96)
print(f"mAP50 {metrics.box.map50:.3f}, {len(found[0].boxes)} boxes by {file}")

"""torchvision's Faster R-CNN, Mask R-CNN and RetinaNet around backbones of zoo, on scenes of digits."""
import torch
from digit_data import scenes_with_boxes
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from zoo.backbones import BackboneWithFPN

SIZES = dict(num_classes=11, min_size=96, max_size=96)  # ten digits and the ground; torchvision resizes pictures to these
backbone = BackboneWithFPN("biformer_nano", out_channels=64)
faster_rcnn = FasterRCNN(backbone, **SIZES)

mask_rcnn = MaskRCNN(BackboneWithFPN("biformer_nano", out_channels=64), **SIZES)

layers = {"0": 1, "1": 2, "2": 3}  # the maps at strides 8, 16 and 32, and two coarser ones
backbone = BackboneWithFPN("biformer_nano", layers, out_channels=64, extra_blocks=LastLevelP6P7(64, 64))
retinanet = RetinaNet(backbone, **SIZES)

pictures, targets = zip(*scenes_with_boxes(2), strict=True)
losses: dict[str, list[float]] = {}
found = {}
for name, model in {"Faster R-CNN": faster_rcnn, "Mask R-CNN": mask_rcnn, "RetinaNet": retinanet}.items():
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-3)
    losses[name] = []
    for _ in range(5):
        loss = sum(model(pictures, targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses[name].append(loss.item())
    with torch.inference_mode():
        found[name] = model.eval()(pictures)[0]
    print(f"{name}: loss {losses[name][0]:.2f}, then {losses[name][-1]:.2f}; {len(found[name]['boxes'])} boxes in the first picture")

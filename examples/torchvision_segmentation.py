"""torchvision's DeepLabV3 around a backbone of zoo, on scenes of digits."""
import torch
from digit_data import scenes_with_maps
from torch.nn.functional import cross_entropy
from torchvision.models.segmentation.deeplabv3 import DeepLabHead, DeepLabV3

from zoo.backbones import FeatureMaps

backbone = FeatureMaps("biformer_nano", {"out": 1}, in_chans=1)  # the map at stride 8
model = DeepLabV3(backbone, DeepLabHead(backbone.channels["out"], num_classes=11))

pictures, maps = scenes_with_maps(8)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
losses = []
for _ in range(12):
    loss = cross_entropy(model(pictures)["out"], maps)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print(f"DeepLabV3: loss {losses[0]:.2f}, then {losses[-1]:.2f}")

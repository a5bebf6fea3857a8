"""Attention gates of zoo in MONAI's 3-D AttentionUnet, and MONAI's way of training, on the MNI152 brain: grey and white matter."""
import torch
from monai.data import DataLoader, Dataset
from monai.inferers import sliding_window_inference
from monai.losses import DiceCELoss
from monai.metrics import DiceMetric
from monai.networks import one_hot
from monai.networks.nets.attentionunet import AttentionLayer, AttentionUnet
from monai.transforms import Compose, RandCropByLabelClassesd, RandFlipd

from zoo.layers import AttentionGate
from zoo.reading.brain import read_hemisphere

network = AttentionUnet(spatial_dims=3, in_channels=1, out_channels=3, channels=(8, 16, 32), strides=(2, 2))
for layer in network.modules():
    if isinstance(layer, AttentionLayer):
        dim = layer.merge.out_channels
        layer.attention = AttentionGate(dim, dim, spatial_dims=3)

volumes = {split: dict(zip(("image", "label"), read_hemisphere(split, resolution=4), strict=True)) for split in ("train", "val")}
crops = Compose([
    RandCropByLabelClassesd(("image", "label"), "label", spatial_size=(16, 24, 24), num_classes=3, num_samples=4),
    RandFlipd(("image", "label"), prob=0.5, spatial_axis=1),
])
loader = DataLoader(Dataset([volumes["train"]] * 10, crops), batch_size=1)
loss_of = DiceCELoss(to_onehot_y=True, softmax=True)
optimizer = torch.optim.AdamW(network.parameters(), lr=5e-3)
losses = []
for batch in loader:
    loss = loss_of(network(batch["image"]), batch["label"])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())

network.eval()
with torch.inference_mode():
    logits = sliding_window_inference(volumes["val"]["image"][None], (16, 24, 24), 4, network)
dice = DiceMetric(include_background=False)
dice(one_hot(logits.argmax(1, keepdim=True), 3), one_hot(volumes["val"]["label"][None], 3))
print(f"loss {losses[0]:.2f}, then {losses[-1]:.2f}; Dice of the other hemisphere {dice.aggregate().item():.2f}")

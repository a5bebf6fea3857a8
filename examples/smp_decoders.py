"""segmentation_models_pytorch around a network of zoo, on scenes of digits."""
import segmentation_models_pytorch as smp
import torch
from digit_data import scenes_with_maps

import zoo  # noqa: F401  registers the models

model = smp.Unet("tu-biformer_nano", encoder_weights=None, in_channels=1, classes=11)
pictures, maps = scenes_with_maps(8)
loss_of = smp.losses.DiceLoss("multiclass")
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
losses = []
for _ in range(10):
    loss = loss_of(model(pictures), maps)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print(f"U-Net: loss {losses[0]:.2f}, then {losses[-1]:.2f}")

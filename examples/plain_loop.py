"""A network of zoo in a plain loop of PyTorch: an epoch on digits."""
import timm
import torch
from digit_data import DigitPictures
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import zoo  # noqa: F401  registers the models

model = timm.create_model("das_resnet_nano", num_classes=10, in_chans=1)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
losses = []
for pictures, labels in DataLoader(DigitPictures("train"), batch_size=32, shuffle=True):
    loss = cross_entropy(model(pictures), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
model.eval()
with torch.inference_mode():
    right = [model(pictures).argmax(1) == labels for pictures, labels in DataLoader(DigitPictures("val"), batch_size=120)]
accuracy = torch.cat(right).float().mean().item()
print(f"{accuracy:.1%} of the held-out digits")

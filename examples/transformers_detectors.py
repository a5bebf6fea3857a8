"""DETR and RT-DETR of transformers around backbones of zoo, on scenes of digits."""
import torch
from digit_data import scenes_with_boxes
from torchvision.ops import box_convert
from transformers import AutoBackbone, DetrConfig, DetrForObjectDetection, RTDetrConfig, RTDetrForObjectDetection, TimmBackboneConfig

import zoo  # noqa: F401  registers the models

SMALL = dict(num_labels=10, num_queries=20, d_model=64, decoder_layers=1, encoder_ffn_dim=128, decoder_ffn_dim=128)  # by default larger
last = TimmBackboneConfig(backbone="biformer_nano", out_indices=[3])
detr = DetrForObjectDetection(DetrConfig(backbone_config=last, encoder_layers=1, **SMALL))

maps = TimmBackboneConfig(backbone="biformer_nano", out_indices=[1, 2, 3])
widths = AutoBackbone.from_config(maps).channels
neck = dict(encoder_in_channels=widths, encoder_hidden_dim=64, decoder_in_channels=[64] * 3, num_denoising=10)
rt_detr = RTDetrForObjectDetection(RTDetrConfig(backbone_config=maps, **neck, **SMALL))

size, count = 96, 4
pictures, targets = zip(*scenes_with_boxes(count, size), strict=True)
labels = [{"class_labels": target["labels"] - 1, "boxes": box_convert(target["boxes"] / size, "xyxy", "cxcywh")} for target in targets]
losses = {}
for name, model in {"DETR": detr, "RT-DETR": rt_detr}.items():
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-3)
    losses[name] = []
    for _ in range(8):
        loss = model(pixel_values=torch.stack(pictures), labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses[name].append(loss.item())
    model.save_pretrained(f"work_dirs/transformers/{name}")
    print(f"{name}: loss {losses[name][0]:.2f}, then {losses[name][-1]:.2f}")
again = RTDetrForObjectDetection.from_pretrained("work_dirs/transformers/RT-DETR")

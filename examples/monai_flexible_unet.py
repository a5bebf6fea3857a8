"""MONAI's FlexibleUNet around a network of zoo, on scenes of digits."""
import torch
from digit_data import scenes_with_maps
from monai.losses import DiceCELoss
from monai.networks.blocks import BaseEncoder
from monai.networks.nets import FLEXUNET_BACKBONE, FlexibleUNet

from zoo.backbones import FeatureMaps


class Encoder(FeatureMaps, BaseEncoder):
    def __init__(self, spatial_dims: int, in_channels: int, pretrained: bool):
        super().__init__("biformer_nano", in_chans=in_channels, pretrained=pretrained)

    def forward(self, x):  # MONAI wants a map at half the size first: here one without channels
        return [x.new_empty(len(x), 0, *(-(-size // 2) for size in x.shape[2:])), *super().forward(x).values()]

    get_encoder_names = classmethod(lambda cls: ["biformer_nano"])
    num_outputs = classmethod(lambda cls: [5])
    num_channels_per_output = classmethod(lambda cls: [(0, *FeatureMaps("biformer_nano").channels.values())])
    get_encoder_parameters = classmethod(lambda cls: [dict(spatial_dims=2, in_channels=3, pretrained=False)])


FLEXUNET_BACKBONE.register_class(Encoder)
model = FlexibleUNet(in_channels=1, out_channels=11, backbone="biformer_nano", decoder_channels=(128, 64, 32, 16, 8))

pictures, maps = scenes_with_maps(8)
loss_of = DiceCELoss(to_onehot_y=True, softmax=True)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
losses = []
for _ in range(10):
    loss = loss_of(model(pictures), maps[:, None])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print(f"FlexibleUNet: loss {losses[0]:.2f}, then {losses[-1]:.2f}")

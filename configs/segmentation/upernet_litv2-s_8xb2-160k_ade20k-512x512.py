# The recipe of Swin: paper and repository (https://github.com/ziplab/LITv2, segmentation) have Semantic FPN only.
# Start from ImageNet: --cfg-options model.backbone.checkpoint=litv2_s.pth, the authors' file.
_base_ = 'mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py'

model = dict(
    backbone=dict(
        _delete_=True, type='TimmBackbone', name='litv2_s', out_norm=True, norm_eps=1e-5, args=dict(drop_path_rate=0.2)),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384))

optim_wrapper = dict(constructor='TimmOptimWrapperConstructor', paramwise_cfg=dict(_delete_=True))

# The authors' settings: 8×8 regions, the recipe of Swin.
# Padding takes part in attention, as theirs does; model.backbone.args.attn_args.mask_padding=True leaves it out.
# Start from ImageNet: --cfg-options model.backbone.checkpoint=biformer_small_best.pth, the authors' file.
_base_ = 'mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py'

model = dict(
    backbone=dict(
        _delete_=True, type='TimmBackbone', name='biformer_small', out_norm=True,
        args=dict(drop_path_rate=0.3, attn_args=dict(regions=8, mask_padding=False))),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256))

optim_wrapper = dict(constructor='TimmOptimWrapperConstructor', paramwise_cfg=dict(_delete_=True))

sync_bn = 'torch'  # of the backbone over all processes

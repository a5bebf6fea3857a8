# The authors' settings: https://github.com/rayleizhu/BiFormer, semantic_segmentation/configs/ade20k/upernet.biformer_small.py
# Padding takes part in attention, as theirs does; model.backbone.args.attn_args.mask_padding=True leaves it out.
# Start from ImageNet: --cfg-options model.backbone.checkpoint=biformer_small_best.pth, the authors' file.
_base_ = 'mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py'

model = dict(
    backbone=dict(
        _delete_=True, type='TimmBackbone', name='biformer_small', out_norm=True,
        args=dict(drop_path_rate=0.3, attn_args=dict(regions=8, mask_padding=False))),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256))

optim_wrapper = dict(
    constructor='TimmOptimWrapperConstructor',
    paramwise_cfg=dict(_delete_=True, decay_multipliers={r'blocks\.\d+\.norm|^backbone\.norms\.': 0.0}))  # LayerNorms
param_scheduler = [  # the decay begins with the warm-up, not after it
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1501),
    dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=0, end=160000),
]

sync_bn = 'torch'  # of the backbone over all processes

# The authors' settings: https://github.com/guoyongcs/TAPADL,
# TAPADL_FAN/segmentation/local_configs/fan/fan_hybrid/tapadl_fan_hybrid_base.1024x1024.city.160k.py
# The fourth map is the third as class attention leaves it, also at stride 16. With one picture a GPU their code's attention diversification
# is 0, for it then takes the mean over the wrong axis; here it is the paper's, of any number.
# Tools take their file, tapadl_fan_base_segmentation.pth, as it is.
# Start from ImageNet: --cfg-options model.backbone.checkpoint=tapadl_fan_base.pth.tar, the authors' file.
_base_ = 'mmseg::segformer/segformer_mit-b5_8xb1-160k_cityscapes-1024x1024.py'

model = dict(
    type='DiversifiedEncoderDecoder',
    attention_diversification=1.0,
    backbone=dict(
        _delete_=True, type='TimmBackbone', name='tap_fan_base_16_p4_hybrid', out_indices=(0, 1, 2, 3),
        args=dict(drop_path_rate=0.0, class_attention_map=True)),
    decode_head=dict(type='LinearSegformerHead', in_channels=[128, 256, 448, 448], channels=768))

optim_wrapper = dict(
    constructor='TimmOptimWrapperConstructor',
    paramwise_cfg=dict(
        _delete_=True, lr_multipliers={r'^decode_head\.': 10.0},
        decay_multipliers={r'(blocks\.\d+|mlp|^head)\.norm': 0.0}))  # norms outside of stem, merging and pooling
param_scheduler = [  # the decay begins with the warm-up, not after it
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1501),
    dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=0, end=160000),
]

sync_bn = 'torch'  # of the backbone over all processes

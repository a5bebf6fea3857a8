# The recipe of Swin: the authors released none for segmentation (https://github.com/price112/Attentive-Convolution).
# Start from ImageNet: --cfg-options model.backbone.checkpoint=AttNet_T2.pth, the authors' file.
_base_ = 'mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py'

model = dict(
    backbone=dict(
        _delete_=True, type='TimmBackbone', name='attnet_t2', out_norm=True, args=dict(drop_path_rate=0.3)),
    decode_head=dict(in_channels=[64, 128, 288, 512]),
    auxiliary_head=dict(in_channels=288))

optim_wrapper = dict(constructor='TimmOptimWrapperConstructor', paramwise_cfg=dict(_delete_=True))

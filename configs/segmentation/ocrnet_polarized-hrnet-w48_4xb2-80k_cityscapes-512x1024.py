# The toolbox's settings for HRNet-W48 with OCR.
# Start from ImageNet: --cfg-options model.backbone.checkpoint=work_dirs/polarized_hrnet_w48_s_in1k/epoch_100.pth, of our own training.
_base_ = 'mmseg::ocrnet/ocrnet_hr48_4xb2-80k_cityscapes-512x1024.py'

model = dict(
    pretrained=None,
    backbone=dict(_delete_=True, type='TimmBackbone', name='polarized_hrnet_w48_s', args=dict(head='')))

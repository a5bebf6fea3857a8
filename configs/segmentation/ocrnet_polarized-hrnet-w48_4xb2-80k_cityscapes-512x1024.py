# The toolbox's settings for HRNet-W48 with OCR.
# Start from the authors' weights for Cityscapes: --cfg-options model.backbone.checkpoint=FILE, of their HRNet with OCR and PSA, which
# the README of https://github.com/DeLightCMU/PSA links.
_base_ = 'mmseg::ocrnet/ocrnet_hr48_4xb2-80k_cityscapes-512x1024.py'

model = dict(
    pretrained=None,
    backbone=dict(_delete_=True, type='TimmBackbone', name='polarized_hrnet_w48_s', args=dict(head='', fuse='bilinear')))

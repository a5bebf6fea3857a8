# The authors' training (plemeri/InSPyReNet, run/Train.py): DUTS in folders, data_root holds train/images, train/masks, val/images and val/masks.
# It starts from ImageNet: --cfg-options model.weights=FILE, a file of timm's swin_base_patch4_window12_384.
_base_ = ['../_base_/datasets/picture_masks.py', '../_base_/default_runtime.py']

data_root = 'data/duts'
pictures = dict(_delete_=True, type='CutOutDataset', size=(384, 384))
transforms = [
    dict(type='RandZoomd', prob=1.0, min_zoom=0.75, max_zoom=1.25, mode=('bilinear', 'nearest'), padding_mode='constant'),
    dict(type='RandFlipd', prob=0.5, spatial_axis=1),
    dict(type='RandRotated', prob=1.0, range_x=0.1745, mode=('bilinear', 'nearest'), padding_mode='zeros'),  # ten degrees
    dict(type='RandStdShiftIntensityd', keys='inputs', factors=0.2, prob=0.5),
    dict(type='RandGaussianSharpend', keys='inputs', prob=0.5),
    dict(type='RandScaleIntensityd', keys='inputs', factors=0.2, prob=0.5),
]

model = dict(type='Cutter', name='inspyrenet_swin_b')

train_dataloader = dict(batch_size=6, dataset=dict(split='train', transforms=transforms, **pictures))
val_dataloader = dict(dataset=dict(split='val', **pictures))
test_dataloader = val_dataloader

val_evaluator = dict(type='SaliencyMetrics')
test_evaluator = val_evaluator

optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='Adam', lr=1e-5))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, begin=0, end=12000, by_epoch=False),
    dict(type='PolyLR', power=0.9, eta_min=1e-7, begin=0, convert_to_iter_based=True),
]
train_cfg = dict(by_epoch=True, max_epochs=60, val_interval=1)
val_cfg = dict()
test_cfg = dict()

del pictures, transforms

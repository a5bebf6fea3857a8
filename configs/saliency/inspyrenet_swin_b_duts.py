# The authors' training (plemeri/InSPyReNet, run/Train.py): DUTS in folders, data_root holds train/images, train/masks, val/images and val/masks
_base_ = ['../_base_/default_runtime.py']

data_root = 'data/duts'
pictures = dict(type='CutOutDataset', size=(384, 384))
transforms = [
    dict(type='RandZoomd', prob=1.0, min_zoom=0.75, max_zoom=1.25, mode=('bilinear', 'nearest'), padding_mode='constant'),
    dict(type='RandFlipd', prob=0.5, spatial_axis=1),
    dict(type='RandRotated', prob=1.0, range_x=0.1745, mode=('bilinear', 'nearest'), padding_mode='zeros'),  # ten degrees
    dict(type='RandStdShiftIntensityd', keys='inputs', factors=0.2, prob=0.5),
    dict(type='RandGaussianSharpend', keys='inputs', prob=0.5),
    dict(type='RandScaleIntensityd', keys='inputs', factors=0.2, prob=0.5),
]

model = dict(type='Cutter', name='inspyrenet_swin_b')  # weights: of Swin-B, as `zoo.load_weights` reads them, of ImageNet

train_dataloader = dict(
    batch_size=6,
    num_workers=4,
    persistent_workers=True,
    pin_memory=True,
    drop_last=True,
    sampler=dict(type='ReproducibleSampler', shuffle=True),
    collate_fn=dict(type='default_collate'),
    dataset=dict(split='train', transforms=transforms, **pictures))
val_dataloader = dict(
    batch_size=1,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type='ReproducibleSampler', shuffle=False),
    collate_fn=dict(type='default_collate'),
    dataset=dict(split='val', **pictures))
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

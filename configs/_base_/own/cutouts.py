# Pictures and masks of what is to be cut out, which samples.csv lists
_base_ = ['./schedule.py', './loaders.py', '../default_runtime.py']

data_root = 'work_dirs/own'  # holds the list

model = dict(type='Cutter', name='inspyrenet_nano')

pictures = dict(type='CutOutDataset', file='samples.csv', size=(384, 384))
transforms = [
    dict(type='RandZoomd', prob=1.0, min_zoom=0.75, max_zoom=1.25, mode=('bilinear', 'nearest'), padding_mode='constant'),
    dict(type='RandRotated', prob=1.0, range_x=0.1745, mode=('bilinear', 'nearest'), padding_mode='zeros'),
    dict(type='RandFlipd', prob=0.5, spatial_axis=1),
    dict(type='RandScaleIntensityd', keys='inputs', factors=0.2, prob=0.5),
    dict(type='RandShiftIntensityd', keys='inputs', offsets=0.2, prob=0.5),
]

train_dataloader = dict(
    batch_size=8,
    dataset=dict(split='train', transforms=transforms, **pictures))
val_dataloader = dict(
    batch_size=1,
    dataset=dict(split='val', **pictures))
test_dataloader = val_dataloader

val_evaluator = dict(type='SaliencyMetrics')
test_evaluator = val_evaluator

optim_wrapper = dict(optimizer=dict(weight_decay=0.0))

del pictures, transforms

# Volumes and masks, which samples.csv lists
_base_ = ['./schedule.py', './loaders.py', '../default_runtime.py']

data_root = 'work_dirs/own'  # holds the list

model = dict(type='Segmentor', name='attention_unet3d', args=dict(num_classes=2), window=(96, 96, 96))

volumes = dict(type='VolumeFolderDataset', file='samples.csv', classes=[], window=(96, 96, 96), spacing=None, clip=None, cache=True)
transforms = [
    dict(type='RandFlipd', prob=0.5, spatial_axis=0),
    dict(type='RandScaleIntensityd', keys='inputs', factors=0.1, prob=0.5),
    dict(type='RandShiftIntensityd', keys='inputs', offsets=0.1, prob=0.5),
]

train_dataloader = dict(
    batch_size=2,
    dataset=dict(split='train', patch=(96, 96, 96), patches=4, transforms=transforms, **volumes))
val_dataloader = dict(
    batch_size=1,
    dataset=dict(split='val', **volumes))
test_dataloader = val_dataloader

val_evaluator = dict(type='MeanDice')
test_evaluator = val_evaluator

optim_wrapper = dict(optimizer=dict(weight_decay=1e-4))

del volumes, transforms

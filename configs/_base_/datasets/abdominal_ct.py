# NIfTI files and masks that a dataset.json names, as the Medical Segmentation Decathlon keeps them
data_root = 'data/ct'
window = (96, 96, 96)
volumes = dict(type='DecathlonDataset', window=window, spacing=(1.5, 1.5, 2.0), clip=(-175.0, 250.0))
transforms = [
    dict(type='RandFlipd', prob=0.5, spatial_axis=0),
    dict(type='RandRotated', range_x=0.2, range_y=0.2, range_z=0.2, prob=0.2, mode=('bilinear', 'nearest'), padding_mode='border'),
    dict(type='RandScaleIntensityd', keys='inputs', factors=0.1, prob=0.5),
    dict(type='RandShiftIntensityd', keys='inputs', offsets=0.1, prob=0.5),
]

train_dataloader = dict(
    batch_size=2,
    num_workers=2,  # each keeps the volumes it has read in memory
    persistent_workers=True,
    pin_memory=True,
    drop_last=True,
    sampler=dict(type='ReproducibleSampler', shuffle=True),
    collate_fn=dict(type='default_collate'),
    dataset=dict(split='train', patch=window, patches=4, transforms=transforms, cache=True, **volumes))
val_dataloader = dict(
    batch_size=1,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type='ReproducibleSampler', shuffle=False),
    collate_fn=dict(type='default_collate'),
    dataset=dict(split='val', **volumes))
test_dataloader = val_dataloader

val_evaluator = dict(type='MeanDice')
test_evaluator = val_evaluator

del window, volumes, transforms

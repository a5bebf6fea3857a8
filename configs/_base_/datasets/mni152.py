# The T1 template that nilearn ships, at 2 mm: 49×117×95 voxels of the left hemisphere to train on, of the right to evaluate on.
window = (32, 32, 32)
transforms = [
    dict(type='RandFlipd', prob=0.5, spatial_axis=0),
    dict(type='RandScaleIntensityd', keys='inputs', factors=0.1, prob=0.5),
    dict(type='RandShiftIntensityd', keys='inputs', offsets=0.1, prob=0.5),
]

train_dataloader = dict(
    batch_size=4,
    num_workers=0,
    drop_last=True,
    sampler=dict(type='ReproducibleSampler', shuffle=True),
    collate_fn=dict(type='default_collate'),
    dataset=dict(type='MNI152Dataset', split='train', window=window, patch=window, patches=80, transforms=transforms))
val_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type='ReproducibleSampler', shuffle=False),
    collate_fn=dict(type='default_collate'),
    dataset=dict(type='MNI152Dataset', split='val', window=window))
test_dataloader = val_dataloader

val_evaluator = dict(type='MeanDice')
test_evaluator = val_evaluator

del window, transforms

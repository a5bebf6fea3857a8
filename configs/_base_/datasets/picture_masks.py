data_root = 'data/pictures'
window = (256, 256)
pictures = dict(type='PictureMaskDataset', classes=['background', 'object'], window=window)
transforms = [
    dict(type='RandFlipd', prob=0.5, spatial_axis=1),
    dict(type='RandScaleIntensityd', keys='inputs', factors=0.2, prob=0.5),
]

train_dataloader = dict(
    batch_size=16,
    num_workers=4,
    persistent_workers=True,
    pin_memory=True,
    drop_last=True,
    sampler=dict(type='ReproducibleSampler', shuffle=True),
    collate_fn=dict(type='default_collate'),
    dataset=dict(split='train', patch=window, transforms=transforms, **pictures))
val_dataloader = dict(
    batch_size=1,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type='ReproducibleSampler', shuffle=False),
    collate_fn=dict(type='default_collate'),
    dataset=dict(split='val', **pictures))
test_dataloader = val_dataloader

val_evaluator = dict(type='MeanIoU')
test_evaluator = val_evaluator

del window, pictures, transforms

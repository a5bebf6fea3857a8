# Pictures and masks, which samples.csv lists
_base_ = ['./schedule.py', './loaders.py', '../default_runtime.py']

data_root = 'work_dirs/own'  # holds the list

model = dict(type='Segmentor', name='attention_unet', args=dict(num_classes=2), window=(256, 256))

pictures = dict(type='PictureMaskDataset', file='samples.csv', classes=[], window=(256, 256))
transforms = [
    dict(type='RandFlipd', prob=0.5, spatial_axis=1),
    dict(type='RandScaleIntensityd', keys='inputs', factors=0.2, prob=0.5),
]

train_dataloader = dict(
    batch_size=16,
    dataset=dict(split='train', patch=(256, 256), transforms=transforms, **pictures))
val_dataloader = dict(
    batch_size=1,
    dataset=dict(split='val', **pictures))
test_dataloader = val_dataloader

val_evaluator = dict(type='MeanIoU')
test_evaluator = val_evaluator

optim_wrapper = dict(optimizer=dict(weight_decay=1e-4))

del pictures, transforms

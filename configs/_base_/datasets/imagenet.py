data_root = 'data/imagenet'  # holds train/CLASS/*.JPEG and val/CLASS/*.JPEG

train_dataloader = dict(
    batch_size=128,
    num_workers=10,
    persistent_workers=True,
    pin_memory=True,
    drop_last=True,
    sampler=dict(type='ReproducibleSampler', shuffle=True, repeats=3),
    collate_fn=dict(type='default_collate'),
    dataset=dict(
        type='ImageFolderDataset', split='train',
        transform=dict(
            is_training=True, input_size=224, interpolation='bicubic', auto_augment='rand-m9-mstd0.5-inc1',
            color_jitter=0.4, re_prob=0.25, re_mode='pixel')))
val_dataloader = dict(
    batch_size=128,
    num_workers=10,
    persistent_workers=True,
    pin_memory=True,
    sampler=dict(type='ReproducibleSampler', shuffle=False),
    collate_fn=dict(type='default_collate'),
    dataset=dict(type='ImageFolderDataset', split='val', transform=dict(input_size=224, interpolation='bicubic', crop_pct=0.875)))
test_dataloader = val_dataloader

val_evaluator = dict(type='Accuracy', topk=(1, 5))
test_evaluator = val_evaluator

data = dict(input_size=(1, 32, 32), mean=(0.5,), std=(0.5,), interpolation='bilinear')

train_dataloader = dict(
    batch_size=64,
    num_workers=1,
    persistent_workers=True,
    drop_last=True,
    sampler=dict(type='ReproducibleSampler', shuffle=True),
    collate_fn=dict(type='default_collate'),
    dataset=dict(
        type='DigitsDataset', split='train', size=32,
        # digits have no mirror images
        transform=dict(is_training=True, scale=(0.7, 1.0), ratio=(0.8, 1.25), hflip=0.0, color_jitter=0.2, re_prob=0.1, **data)))
val_dataloader = dict(
    batch_size=120,
    num_workers=0,
    sampler=dict(type='ReproducibleSampler', shuffle=False),
    collate_fn=dict(type='default_collate'),
    dataset=dict(type='DigitsDataset', split='val', size=32, transform=dict(crop_pct=1.0, **data)))
test_dataloader = val_dataloader

val_evaluator = dict(type='Accuracy', topk=(1, 5))
test_evaluator = val_evaluator

del data

train_dataloader = dict(
    batch_size=16,
    num_workers=0,
    drop_last=True,
    sampler=dict(type='ReproducibleSampler', shuffle=True),
    collate_fn=dict(type='default_collate'),
    dataset=dict(type='DigitScenesDataset', split='train', scenes=800, cache=True))
val_dataloader = dict(
    batch_size=40,
    num_workers=0,
    sampler=dict(type='ReproducibleSampler', shuffle=False),
    collate_fn=dict(type='default_collate'),
    dataset=dict(type='DigitScenesDataset', split='val', scenes=200))
test_dataloader = val_dataloader

val_evaluator = dict(type='MeanIoU')
test_evaluator = val_evaluator

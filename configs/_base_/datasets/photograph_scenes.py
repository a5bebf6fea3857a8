train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    drop_last=True,
    sampler=dict(type='ReproducibleSampler', shuffle=True),
    collate_fn=dict(type='default_collate'),
    dataset=dict(type='PhotographScenesDataset', split='train', scenes=400, size=64, cache=True))
val_dataloader = dict(
    batch_size=25,
    num_workers=0,
    sampler=dict(type='ReproducibleSampler', shuffle=False),
    collate_fn=dict(type='default_collate'),
    dataset=dict(type='PhotographScenesDataset', split='val', scenes=100, size=64))
test_dataloader = val_dataloader

val_evaluator = dict(type='SaliencyMetrics')
test_evaluator = val_evaluator

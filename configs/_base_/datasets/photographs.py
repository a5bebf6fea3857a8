train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    drop_last=True,
    sampler=dict(type='ReproducibleSampler', shuffle=True),
    collate_fn=dict(type='default_collate'),
    dataset=dict(type='PhotographsDataset', split='train', scale=2, crop=48, crops=12, cache=True))
val_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type='ReproducibleSampler', shuffle=False),
    collate_fn=dict(type='default_collate'),
    dataset=dict(type='PhotographsDataset', split='val', scale=2, cache=True))
test_dataloader = val_dataloader

val_evaluator = dict(type='Restoration')
test_evaluator = val_evaluator

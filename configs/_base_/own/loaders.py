# How samples are read, whatever they are
train_dataloader = dict(
    num_workers=1,
    persistent_workers=True,
    drop_last=True,
    sampler=dict(type='ReproducibleSampler', shuffle=True),
    collate_fn=dict(type='default_collate'))
val_dataloader = dict(
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type='ReproducibleSampler', shuffle=False),
    collate_fn=dict(type='default_collate'))
test_dataloader = val_dataloader

# The authors' training (alexanderkroner/saliency, config.py): SALICON in folders, data_root holds train/images, train/maps, train/fixations, val/images and so on
_base_ = ['../_base_/default_runtime.py']

data_root = 'data/salicon'
pictures = dict(type='FixationDataset', size=(240, 320))

model = dict(type='FixationPredictor', name='msinet', args=dict(pretrained=True), loss='divergence')

train_dataloader = dict(
    batch_size=1,
    num_workers=4,
    persistent_workers=True,
    drop_last=True,
    sampler=dict(type='ReproducibleSampler', shuffle=True),
    collate_fn=dict(type='default_collate'),
    dataset=dict(split='train', **pictures))
val_dataloader = dict(
    batch_size=1,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type='ReproducibleSampler', shuffle=False),
    collate_fn=dict(type='default_collate'),
    dataset=dict(split='val', **pictures))
test_dataloader = val_dataloader

val_evaluator = dict(type='FixationMetrics')
test_evaluator = val_evaluator

optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='Adam', lr=1e-5))
train_cfg = dict(by_epoch=True, max_epochs=10, val_interval=1)
val_cfg = dict()
test_cfg = dict()

del pictures

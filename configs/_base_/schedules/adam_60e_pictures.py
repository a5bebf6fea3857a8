optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='Adam', lr=1e-3))

param_scheduler = [  # the cosine ends with the last epoch
    dict(type='LinearLR', start_factor=1e-2, begin=0, end=1, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min_ratio=0.01, begin=1, convert_to_iter_based=True),
]

train_cfg = dict(by_epoch=True, max_epochs=60, val_interval=10)
val_cfg = dict()
test_cfg = dict()

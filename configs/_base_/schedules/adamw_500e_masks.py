optim_wrapper = dict(
    type='AutocastOptimWrapper',
    constructor='TimmOptimWrapperConstructor',
    optimizer=dict(type='AdamW', lr=1e-3, weight_decay=1e-4),
    clip_grad=dict(max_norm=12.0))

param_scheduler = [  # the cosine ends with the last epoch
    dict(type='LinearLR', start_factor=1e-3, begin=0, end=10, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min_ratio=0.01, begin=10, convert_to_iter_based=True),
]

train_cfg = dict(by_epoch=True, max_epochs=500, val_interval=25)
val_cfg = dict()
test_cfg = dict()

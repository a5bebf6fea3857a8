# For small data: numbers of steps, rate, warm-up, average and patience are set by how many samples there are
optim_wrapper = dict(
    type='OptimWrapper',
    constructor='TimmOptimWrapperConstructor',
    optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05),
    clip_grad=dict(max_norm=5.0))

param_scheduler = [  # the cosine ends with the last epoch
    dict(type='LinearLR', start_factor=1e-2, begin=0, end=3, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min_ratio=0.01, begin=3, convert_to_iter_based=True),
]

train_cfg = dict(by_epoch=True, max_epochs=30, val_interval=1)
val_cfg = dict()
test_cfg = dict()

report = True
custom_hooks = [
    dict(type='ModelEMAHook', decay=0.99),
    dict(type='EarlyStoppingHook', monitor='accuracy/top1', rule='greater', min_delta=0.01, patience=10),
]

# 8 GPUs with 128 images each: 5e-4 per 512 images
optim_wrapper = dict(
    type='AutocastOptimWrapper',
    constructor='TimmOptimWrapperConstructor',
    optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05))
auto_scale_lr = dict(enable=True, base_batch_size=1024)

param_scheduler = [  # the cosine ends with the last epoch
    dict(type='LinearLR', start_factor=1e-3, begin=0, end=5, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min_ratio=0.01, begin=5, convert_to_iter_based=True),
]

train_cfg = dict(by_epoch=True, max_epochs=300)
val_cfg = dict()
test_cfg = dict()

custom_hooks = [dict(type='IterationSeedHook'), dict(type='ModelEMAHook', decay=0.99996), dict(type='RecordHook')]

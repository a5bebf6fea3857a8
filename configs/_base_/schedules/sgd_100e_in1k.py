# 8 GPUs with 32 images each, the schedule of ResNet (arXiv 1512.03385) with a tenth of the learning rate every 30 epochs
optim_wrapper = dict(
    type='AutocastOptimWrapper',
    constructor='TimmOptimWrapperConstructor',
    optimizer=dict(type='SGD', lr=0.1, momentum=0.9, weight_decay=1e-4))
auto_scale_lr = dict(enable=True, base_batch_size=256)

param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, begin=0, end=5, convert_to_iter_based=True),
    dict(type='MultiStepLR', milestones=[30, 60, 90], gamma=0.1),
]

train_cfg = dict(by_epoch=True, max_epochs=100)
val_cfg = dict()
test_cfg = dict()

custom_hooks = [dict(type='IterationSeedHook'), dict(type='RecordHook')]

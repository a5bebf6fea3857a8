# ResNet's and SKNet's: 256 images, learning rate 0.1, a tenth of it after every 30 epochs
optim_wrapper = dict(
    type='AutocastOptimWrapper',
    constructor='TimmOptimWrapperConstructor',
    optimizer=dict(type='SGD', lr=0.1, momentum=0.9, weight_decay=1e-4))
auto_scale_lr = dict(enable=True, base_batch_size=256)

param_scheduler = [dict(type='MultiStepLR', milestones=[30, 60, 90], gamma=0.1)]

train_cfg = dict(by_epoch=True, max_epochs=100)
val_cfg = dict()
test_cfg = dict()

# DeiT's, and its heirs': 8 GPUs with 128 images each, 5e-4 per 512 images; the average of the weights is kept and not reported
# (https://github.com/facebookresearch/deit, main.py; https://github.com/rayleizhu/BiFormer, configs/train_args.yaml)
optim_wrapper = dict(
    type='AutocastOptimWrapper',
    constructor='TimmOptimWrapperConstructor',
    optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05))
auto_scale_lr = dict(enable=True, base_batch_size=1024)

param_scheduler = [dict(type='WarmupCosineLR', warmup_epochs=5, warmup_lr=1e-6, min_lr=1e-5, lag=1)]

train_cfg = dict(by_epoch=True, max_epochs=300)
val_cfg = dict()
test_cfg = dict()

custom_hooks = [dict(type='ModelEMAHook', decay=0.99996, report='weights')]

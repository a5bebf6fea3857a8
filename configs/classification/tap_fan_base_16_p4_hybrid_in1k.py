# The authors' settings: https://github.com/guoyongcs/TAPADL, TAPADL_FAN/README.md, TAPADL_FAN/main.py
# Their best checkpoint is that of the best accuracy of weights and average: of the two best kept here, the better.
_base_ = ['../_base_/datasets/imagenet.py', '../_base_/schedules/adamw_300e_in1k.py', '../_base_/default_runtime.py']

model = dict(
    type='ImageClassifier',
    name='tap_fan_base_16_p4_hybrid',
    args=dict(num_classes=1000, drop_path_rate=0.35),
    mixup=dict(mixup_alpha=0.8, cutmix_alpha=1.0, prob=1.0, switch_prob=0.5),
    label_smoothing=0.1,
    attention_diversification=1.0)

# 64 GPUs with 64 images each
train_dataloader = dict(
    batch_size=64, sampler=dict(repeats=1), dataset=dict(transform=dict(re_prob=0.3, interpolation='random')))
val_dataloader = dict(dataset=dict(transform=dict(crop_pct=1.0)))
test_dataloader = val_dataloader

optim_wrapper = dict(optimizer=dict(lr=4e-3, weight_decay=0.05))
auto_scale_lr = dict(base_batch_size=4096)

param_scheduler = [dict(type='WarmupCosineLR', warmup_epochs=10, warmup_lr=1e-6, min_lr=1e-6, end=300)]
train_cfg = dict(max_epochs=310)  # the last ten at the lowest rate

custom_hooks = [dict(type='ModelEMAHook', decay=0.99996, report='both')]
default_hooks = dict(checkpoint=dict(save_best=['accuracy/top1', 'accuracy/top1_ema'], rule='greater'))

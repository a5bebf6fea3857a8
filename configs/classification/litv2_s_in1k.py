# The authors' settings: https://github.com/ziplab/LITv2, classification/config.py, classification/configs/litv2-small.yaml
# 8 GPUs with 128 images each.
_base_ = ['../_base_/datasets/imagenet.py', '../_base_/schedules/adamw_300e_in1k.py', '../_base_/default_runtime.py']

model = dict(
    type='ImageClassifier',
    name='litv2_s',
    args=dict(num_classes=1000, drop_path_rate=0.2),
    mixup=dict(mixup_alpha=0.8, cutmix_alpha=1.0, prob=1.0, switch_prob=0.5),
    label_smoothing=0.1)

optim_wrapper = dict(
    paramwise_cfg=dict(lr_multipliers={r'downsample\.offset\.weight$': 0.01}),  # where the tokens to merge lie
    clip_grad=dict(max_norm=5.0))

param_scheduler = [
    dict(type='WarmupCosineLR', warmup_epochs=20, warmup_lr=1e-6, min_lr=1e-5, lag=1, convert_to_iter_based=True)]

train_dataloader = dict(sampler=dict(repeats=1))
custom_hooks = []

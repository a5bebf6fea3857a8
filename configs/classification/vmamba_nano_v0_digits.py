_base_ = ['../_base_/datasets/digits.py', '../_base_/schedules/adamw_20e_digits.py', '../_base_/default_runtime.py']

model = dict(
    type='ImageClassifier',
    name='vmamba_nano_v0',
    args=dict(num_classes=10, in_chans=1, drop_path_rate=0.05),
    mixup=dict(mixup_alpha=0.2, cutmix_alpha=1.0, prob=0.3, switch_prob=0.3),
    label_smoothing=0.1)

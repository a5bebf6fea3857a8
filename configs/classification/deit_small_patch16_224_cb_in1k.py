# DeiT's recipe, which the paper keeps
_base_ = ['../_base_/datasets/imagenet.py', '../_base_/schedules/adamw_300e_in1k.py', '../_base_/default_runtime.py']

model = dict(
    type='ImageClassifier',
    name='deit_small_patch16_224_cb',
    args=dict(num_classes=1000, drop_path_rate=0.1),
    mixup=dict(mixup_alpha=0.8, cutmix_alpha=1.0, prob=1.0, switch_prob=0.5),
    label_smoothing=0.1)

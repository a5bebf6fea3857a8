# A DeiT from whose blocks 0 and 2 attention fades out in the first three quarters of the epochs
_base_ = ['../_base_/datasets/digits.py', '../_base_/schedules/adamw_20e_digits.py', '../_base_/default_runtime.py']

model = dict(
    type='ImageClassifier',
    name='lambda_deit_nano_02',
    args=dict(removed=(), num_classes=10, in_chans=1, img_size=32, patch_size=8),
    changes=[dict(type='remove_attention', blocks=[0, 2], share=1.0)],
    mixup=dict(mixup_alpha=0.2, cutmix_alpha=1.0, prob=0.3, switch_prob=0.3),
    label_smoothing=0.1)

custom_hooks = [dict(type='ModelEMAHook', decay=0.98), dict(type='AttentionDilutionHook')]
train_cfg = dict(max_epochs=30)

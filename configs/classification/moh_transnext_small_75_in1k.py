# The authors' settings: https://github.com/SkyworkAI/MoH, MoH-ViT/main.py, MoH-ViT/configs/moh_transnext_small_75.py
# 8 GPUs with 128 images each.
_base_ = ['../_base_/datasets/imagenet.py', '../_base_/schedules/adamw_300e_in1k.py', '../_base_/default_runtime.py']

model = dict(
    type='ImageClassifier',
    name='moh_transnext_small_75',
    args=dict(num_classes=1000, drop_path_rate=0.45),
    mixup=dict(mixup_alpha=0.8, cutmix_alpha=1.0, prob=1.0, switch_prob=0.5),
    label_smoothing=0.1,
    load_balancing=0.01)

optim_wrapper = dict(clip_grad=dict(max_norm=1.0))
custom_hooks = []

# The authors' settings (https://github.com/sihaoevery/lambda_vit, main_lambda.py, script/shrink_tiny.sh): 8 GPUs with 256 images each,
# from trained weights of DeiT, such as timm's file for deit_tiny_patch16_224: --cfg-options model.weights=FILE
_base_ = ['../_base_/datasets/imagenet.py', '../_base_/schedules/adamw_300e_in1k.py', '../_base_/default_runtime.py']

model = dict(
    type='ImageClassifier',
    name='lambda_deit_tiny_024',
    args=dict(removed=(), num_classes=1000, drop_path_rate=0.1),
    changes=[dict(type='remove_attention', blocks=[0, 2, 4], share=1.0)],
    mixup=dict(mixup_alpha=0.8, cutmix_alpha=1.0, prob=1.0, switch_prob=0.5),
    label_smoothing=0.1)

train_dataloader = dict(batch_size=256, dataset=dict(transform=dict(color_jitter=0.3)))
optim_wrapper = dict(optimizer=dict(lr=2e-3))
auto_scale_lr = dict(base_batch_size=2048)
custom_hooks = [dict(type='ModelEMAHook', decay=0.99996, report='weights'), dict(type='AttentionDilutionHook')]
train_cfg = dict(max_epochs=400)

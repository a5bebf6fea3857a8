# The authors' settings: https://github.com/price112/Attentive-Convolution, runs/T2.txt, and train.py, whose adaptive clipping of
# gradients util/engine.py does not pass on: gradients are not clipped.
_base_ = ['../_base_/datasets/imagenet.py', '../_base_/schedules/adamw_300e_in1k.py', '../_base_/default_runtime.py']

model = dict(
    type='ImageClassifier',
    name='attnet_t2',
    args=dict(num_classes=1000, drop_path_rate=0.2),
    mixup=dict(mixup_alpha=0.8, cutmix_alpha=1.0, prob=1.0, switch_prob=0.5),
    label_smoothing=0.1)

# 32 GPUs with 128 images each
optim_wrapper = dict(optimizer=dict(lr=4e-3, weight_decay=0.05))  # none on norms, biases, layer scale and lateral inhibition
auto_scale_lr = dict(base_batch_size=4096)

param_scheduler = [dict(type='WarmupCosineLR', warmup_epochs=5, warmup_lr=1e-6, min_lr=1e-6, lag=1)]

custom_hooks = [dict(type='ModelEMAHook', decay=0.99995, report='weights')]

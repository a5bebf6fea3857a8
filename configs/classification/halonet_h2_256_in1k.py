# The schedule that the zoo's other attention networks are trained with: the paper's own (arXiv 2103.12731) was not at hand.
_base_ = ['../_base_/datasets/imagenet.py', '../_base_/schedules/adamw_300e_in1k.py', '../_base_/default_runtime.py']

model = dict(
    type='ImageClassifier',
    name='halonet_h2_256',
    args=dict(num_classes=1000, drop_path_rate=0.1),
    mixup=dict(mixup_alpha=0.2, cutmix_alpha=1.0, prob=1.0, switch_prob=0.5),
    label_smoothing=0.1)

train_dataloader = dict(dataset=dict(transform=dict(input_size=256)))
val_dataloader = dict(dataset=dict(transform=dict(input_size=256)))
test_dataloader = val_dataloader

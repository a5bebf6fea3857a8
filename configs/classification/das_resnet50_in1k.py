# The standard recipe of ResNet: the paper's own (arXiv 2311.12091) was not at hand.
_base_ = ['../_base_/datasets/imagenet.py', '../_base_/schedules/sgd_100e_in1k.py', '../_base_/default_runtime.py']

model = dict(type='ImageClassifier', name='das_resnet50', args=dict(num_classes=1000))

train_dataloader = dict(
    batch_size=32,
    sampler=dict(repeats=1),
    dataset=dict(transform=dict(_delete_=True, is_training=True, input_size=224, interpolation='bicubic', color_jitter=0.4)))

# random crops and mirror images only, as in the paper (its sampling balanced by class is left out)
_base_ = ['../_base_/datasets/imagenet.py', '../_base_/schedules/sgd_100e_in1k.py', '../_base_/default_runtime.py']

model = dict(
    type='ImageClassifier',
    name='sknet50',
    args=dict(num_classes=1000),
    label_smoothing=0.1)

train_dataloader = dict(
    sampler=dict(repeats=1),
    dataset=dict(transform=dict(auto_augment=None, color_jitter=0.0, re_prob=0.0, interpolation='bilinear')))
val_dataloader = dict(dataset=dict(transform=dict(interpolation='bilinear')))
test_dataloader = val_dataloader

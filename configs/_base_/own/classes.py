# Pictures of classes, which samples.csv lists
_base_ = ['./schedule.py', './loaders.py', '../default_runtime.py']

data_root = 'work_dirs/own'  # holds the list

model = dict(type='ImageClassifier', name='biformer_nano', args=dict(num_classes=2), label_smoothing=0.1)

pictures = dict(type='ListedPicturesDataset', file='samples.csv', classes=[])
train_dataloader = dict(
    batch_size=32,
    dataset=dict(
        split='train',
        transform=dict(is_training=True, interpolation='bicubic', scale=(0.6, 1.0), hflip=0.5, color_jitter=0.2, re_prob=0.1),
        **pictures))
val_dataloader = dict(
    batch_size=32,
    dataset=dict(split='val', transform=dict(interpolation='bicubic', crop_pct=1.0), **pictures))
test_dataloader = val_dataloader

val_evaluator = dict(type='Accuracy', topk=(1, 5))
test_evaluator = val_evaluator

del pictures

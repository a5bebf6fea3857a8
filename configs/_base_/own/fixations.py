# Pictures and maps of fixations, which samples.csv lists
_base_ = ['./schedule.py', './loaders.py', '../default_runtime.py']

data_root = 'work_dirs/own'  # holds the list

model = dict(type='FixationPredictor', name='msinet', loss='divergence')

pictures = dict(type='FixationDataset', file='samples.csv', size=(240, 320))
train_dataloader = dict(
    batch_size=8,
    dataset=dict(split='train', flip=0.5, **pictures))
val_dataloader = dict(
    batch_size=1,
    dataset=dict(split='val', **pictures))
test_dataloader = val_dataloader

val_evaluator = dict(type='FixationMetrics')
test_evaluator = val_evaluator

optim_wrapper = dict(optimizer=dict(weight_decay=0.0))

del pictures

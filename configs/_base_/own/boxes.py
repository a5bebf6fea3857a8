# Pictures and boxes, with masks or without, which train.json and val.json list
_base_ = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'

model = dict(
    backbone=dict(_delete_=True, type='TimmBackbone', name='biformer_nano', out_norm=True),
    neck=dict(in_channels=[32, 64, 128, 192], norm_cfg=dict(type='GN', num_groups=8)))

data_root = 'work_dirs/own'  # holds the lists
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='Resize', scale=(640, 640), keep_ratio=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(640, 640), keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]
train_dataloader = dict(
    batch_size=8,
    dataset=dict(
        data_root=data_root, ann_file='train.json', data_prefix=dict(img=''), metainfo=dict(classes=()),
        filter_cfg=dict(min_size=1), pipeline=train_pipeline))
val_dataloader = dict(
    dataset=dict(
        data_root=data_root, ann_file='val.json', data_prefix=dict(img=''), metainfo=dict(classes=()), pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file='val.json')
test_evaluator = val_evaluator

optim_wrapper = dict(
    constructor='TimmOptimWrapperConstructor',
    optimizer=dict(_delete_=True, type='AdamW', lr=1e-3, weight_decay=0.05),
    clip_grad=dict(max_norm=5.0))
param_scheduler = [  # the cosine ends with the last epoch
    dict(type='LinearLR', start_factor=1e-2, begin=0, end=3, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min_ratio=0.01, begin=3, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=30)
custom_hooks = [
    dict(type='ModelEMAHook', decay=0.99),
    dict(type='EarlyStoppingHook', monitor='coco/bbox_mAP', rule='greater', min_delta=0.001, patience=10),
]
report = True

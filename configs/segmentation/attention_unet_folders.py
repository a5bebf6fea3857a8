# Pictures and masks in folders: data_root holds train/images, train/masks, val/images, val/masks
_base_ = ['../_base_/datasets/picture_masks.py', '../_base_/schedules/adamw_500e_masks.py', '../_base_/default_runtime.py']

model = dict(
    type='Segmentor',
    name='attention_unet',
    args=dict(encoder='convnext_nano', num_classes=2),
    window=(256, 256))

train_cfg = dict(max_epochs=100, val_interval=5)

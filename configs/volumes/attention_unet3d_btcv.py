# Abdominal CT in NIfTI files with a dataset.json (BTCV as MONAI's tutorials keep it): data_root=/data/btcv
_base_ = ['../_base_/datasets/abdominal_ct.py', '../_base_/schedules/adamw_500e_masks.py', '../_base_/default_runtime.py']

model = dict(
    type='Segmentor',
    name='attention_unet3d',
    args=dict(num_classes=14),
    loss=dict(include_background=False),
    window=(96, 96, 96),
    overlap=0.5)


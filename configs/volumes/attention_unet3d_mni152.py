_base_ = ['../_base_/datasets/mni152.py', '../_base_/schedules/adamw_15e_masks.py', '../_base_/default_runtime.py']

model = dict(
    type='Segmentor',
    name='attention_unet3d',
    args=dict(num_classes=3, widths=(16, 32, 64, 128), light_decoder=True, norm='instance'),
    window=(32, 32, 32))

default_hooks = dict(logger=dict(interval=5))

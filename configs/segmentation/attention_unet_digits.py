_base_ = ['../_base_/datasets/digit_scenes.py', '../_base_/schedules/adamw_15e_masks.py', '../_base_/default_runtime.py']

model = dict(
    type='Segmentor',
    name='attention_unet',
    args=dict(num_classes=11, in_chans=1, widths=(16, 32, 64, 128), light_decoder=True))


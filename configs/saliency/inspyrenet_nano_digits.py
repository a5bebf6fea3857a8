# Digits on photographs, with exact masks; neither digits nor photographs that are evaluated on were trained on
_base_ = ['../_base_/datasets/photograph_scenes.py', '../_base_/schedules/adamw_15e_masks.py', '../_base_/default_runtime.py']

model = dict(type='Cutter', name='inspyrenet_nano', args=dict(base_size=(64, 64)))

train_cfg = dict(max_epochs=6, val_interval=3)

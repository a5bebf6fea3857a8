_base_ = './attention_unet3d_mni152.py'

model = dict(name='unet3d')

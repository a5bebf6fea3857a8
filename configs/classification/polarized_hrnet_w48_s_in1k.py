# as polarized_resnet50_s_in1k: HRNet's authors train with SKNet's rate, steps and length
_base_ = './sknet50_in1k.py'

model = dict(name='polarized_hrnet_w48_s')

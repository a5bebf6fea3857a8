# as polarized_resnet50_s_in1k: HRNet's authors train with SKNet's rate for a batch, its steps and length, but with Nesterov's momentum:
# https://github.com/HRNet/HRNet-Image-Classification, experiments/cls_hrnet_w48_sgd_lr5e-2_wd1e-4_bs32_x100.yaml
_base_ = './sknet50_in1k.py'

model = dict(name='polarized_hrnet_w48_s')

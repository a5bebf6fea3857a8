# the paper starts from ImageNet weights and does not say how they were trained: SKNet's recipe, also for ResNet-50
_base_ = './sknet50_in1k.py'

model = dict(name='polarized_resnet50_s')

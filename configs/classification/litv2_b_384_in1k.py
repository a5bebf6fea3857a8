# The authors' fine-tuning at 384×384 pixels of what litv2_b_in1k ends with:
# https://github.com/ziplab/LITv2, classification/configs/litv2-base-finetune-384.yaml
# Start from the authors' file instead: --cfg-options load_from=None model.args.pretrained=True
# "model.args.pretrained_cfg_overlay={'file': 'litv2_b.pth'}".
_base_ = './litv2_b_in1k.py'

model = dict(name='litv2_b_384')
load_from = 'work_dirs/litv2_b_in1k/epoch_300.pth'

optim_wrapper = dict(optimizer=dict(lr=4e-5, weight_decay=1e-8))
param_scheduler = [
    dict(type='WarmupCosineLR', warmup_epochs=5, warmup_lr=4e-8, min_lr=4e-7, lag=1, convert_to_iter_based=True)]
train_cfg = dict(max_epochs=30)

train_dataloader = dict(dataset=dict(transform=dict(input_size=384)))
val_dataloader = dict(dataset=dict(transform=dict(input_size=384, crop_pct=1.0, crop_mode='squash')))
test_dataloader = val_dataloader

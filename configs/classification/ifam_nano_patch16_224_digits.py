_base_ = ['../_base_/datasets/digits.py', '../_base_/schedules/adamw_20e_digits.py', '../_base_/default_runtime.py']

model = dict(
    type='ImageClassifier',
    name='ifam_nano_patch16_224',
    args=dict(num_classes=10, in_chans=1, img_size=32, patch_size=4),
    # of a network that starts from nothing: with the weights for trained ones its maps are soon alike everywhere
    part_discovery=dict(weights=dict(total_variation=0.1, entropy=0.1, equivariance=0.1)))

train_cfg = dict(max_epochs=30)

# NIfTI files in folders, as TCIA's Pancreas-CT: data_root holds train/images, train/labels, val/images, val/labels
_base_ = './attention_unet3d_btcv.py'

model = dict(args=dict(num_classes=2))

train_dataloader = dict(dataset=dict(type='VolumeFolderDataset', classes=['background', 'pancreas']))
val_dataloader = dict(dataset=dict(type='VolumeFolderDataset', classes=['background', 'pancreas']))
test_dataloader = val_dataloader

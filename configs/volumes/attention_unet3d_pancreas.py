# The paper's task, the pancreas and its tumours: Task07_Pancreas of the Decathlon, data_root=/data/Task07_Pancreas
_base_ = './attention_unet3d_btcv.py'

model = dict(args=dict(num_classes=3))

# 281 volumes are too many to keep in memory
train_dataloader = dict(num_workers=8, dataset=dict(cache=False))

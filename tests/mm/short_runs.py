"""Changes that make the digits config a run of seconds."""

# four steps of 16 images an epoch, of a transformer without batch norm
TINY = [
    "model.name=test_vit", "model.args={'num_classes': 10, 'in_chans': 1, 'img_size': 32, 'drop_path_rate': 0.1}",
    "train_dataloader.dataset.limit=64", "train_dataloader.batch_size=16", "train_dataloader.num_workers=0",
    "train_dataloader.persistent_workers=False", "val_dataloader.dataset.limit=40", "test_dataloader.dataset.limit=40",
    "train_cfg.max_epochs=2", "train_cfg.val_interval=2", "auto_scale_lr.enable=False",
]

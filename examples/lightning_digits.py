"""A network of zoo in Lightning: an epoch on digits, and its checkpoint back in zoo."""
import lightning
import timm
import torch
from digit_data import DigitPictures
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import zoo


class Classifier(lightning.LightningModule):
    def __init__(self, name: str, **args):
        super().__init__()
        self.model = timm.create_model(name, **args)

    def training_step(self, batch, _):
        return cross_entropy(self.model(batch[0]), batch[1])

    def validation_step(self, batch, _):
        self.log("accuracy", (self.model(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


args = dict(num_classes=10, in_chans=1)
trainer = lightning.Trainer(max_epochs=1, default_root_dir="work_dirs/lightning", logger=False, accelerator="auto")
train, val = (DataLoader(DigitPictures(split), batch_size=32, shuffle=split == "train") for split in ("train", "val"))
classifier = Classifier("das_resnet_nano", **args)
trainer.fit(classifier, train, val)
print(trainer.callback_metrics)

model = timm.create_model("das_resnet_nano", **args)
zoo.load_weights(model, trainer.checkpoint_callback.best_model_path)

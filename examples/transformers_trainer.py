"""A network of zoo in transformers: trained by its Trainer for an epoch on digits, saved, and loaded again."""
import timm
import torch
from digit_data import DigitPictures
from transformers import AutoModelForImageClassification, TimmWrapperConfig, TimmWrapperForImageClassification, Trainer, TrainingArguments

import zoo

folder = "work_dirs/transformers"
config = TimmWrapperConfig(architecture="das_resnet_nano", num_labels=10, model_args={"in_chans": 1})
model = TimmWrapperForImageClassification(config)


def collate(samples):
    pictures, labels = zip(*samples, strict=True)
    return {"pixel_values": torch.stack(pictures), "labels": torch.tensor(labels)}


def accuracy(evaluated):
    return {"accuracy": float((evaluated.predictions.argmax(1) == evaluated.label_ids).mean())}


arguments = TrainingArguments(folder, num_train_epochs=1, per_device_train_batch_size=32, learning_rate=2e-3, report_to="none")
trainer = Trainer(model, arguments, data_collator=collate, compute_metrics=accuracy,
                  train_dataset=DigitPictures("train"), eval_dataset=DigitPictures("val"))
trainer.train()
evaluated = trainer.evaluate()
print(evaluated)
model.save_pretrained(f"{folder}/digits")
again = AutoModelForImageClassification.from_pretrained(f"{folder}/digits")
network = timm.create_model("das_resnet_nano", num_classes=10, in_chans=1)
zoo.load_weights(network, f"{folder}/digits/model.safetensors")

"""Makes the pictures of the mechanisms' pages: trains each small network on digits for some minutes in all, and looks at one digit.

    python docs/pictures.py            # or: python docs/pictures.py hilo sk
"""
import sys
from pathlib import Path

import torch
from PIL import Image
from torch import nn

import zoo
from zoo.checkpoints import load_trained
from zoo.mm import train
from zoo.mm.checkpoint import latest_checkpoint
from zoo.mm.datasets import DigitsDataset
from zoo.mm.mask_datasets import DigitScenesDataset
from zoo.seeing.classifiers import mechanisms
from zoo.seeing.figures import new_figure, render
from zoo.seeing.page import Seen

SIDE, EPOCHS, COLOURS = 64, 6, 96
FOLDER = Path(__file__).parent / "pictures"
STAGES = {"atconv": 1, "gates": -1, "routing": 1, "sk": 1}  # which stage is shown, where it is not the first


def network(mechanism: str) -> str:
    return "attention_unet" if mechanism == "gates" else zoo.list_models("*_nano*", mechanism)[0]


def trained(name: str) -> Path:
    """The checkpoint of a network, trained on digits of `SIDE` pixels unless it was; where attention may go, with all of it."""
    options = ["model.changes=[]", "custom_hooks=[{'type':'ModelEMAHook','decay':0.98}]"] if name.startswith("lambda") else []
    options += [f"train_cfg.max_epochs={EPOCHS}", f"train_cfg.val_interval={EPOCHS}"]
    if name != "attention_unet":
        for part in ("train", "val"):
            options += [f"{part}_dataloader.dataset.size={SIDE}", f"{part}_dataloader.dataset.transform.input_size=(1,{SIDE},{SIDE})"]
    if "deit" in name:
        options.append(f"model.args.img_size={SIDE}")
    folder, _ = train(f"{name}_digits", work_dir=Path("work_dirs/pictures") / name, resume="auto", cfg_options=options)
    return latest_checkpoint(folder)


def entropies(model: nn.Module) -> Seen:
    """How much the attention of every block tells the network of the held-out digits."""
    digits = DigitsDataset("val", {"input_size": (1, SIDE, SIDE), "mean": (0.5,), "std": (0.5,)}, size=SIDE)
    images = torch.stack([digits.transform(digits.read(i)[0]) for i in range(len(digits))])
    choices = zoo.choose_blocks(model, [(images, None)], count=2)
    figure, axes = new_figure(2)
    for number, (each, choice) in enumerate(zip(axes, choices, strict=True), 1):
        blocks = list(choice.entropies)
        each.bar(list(map(str, blocks)), list(choice.entropies.values()),
                 color=["tab:orange" if block == choice.block else "tab:blue" for block in blocks])
        each.set(title=f"choice {number}", xlabel="block", ylabel="transfer entropy, bits")
        each.set_axis_on()
    first, second = (choice.block for choice in choices)
    return Seen("entropies", "Transfer entropies", f"First block {first} is chosen, then block {second} with it (orange).", render(figure))


def main() -> None:
    digit, _ = DigitsDataset("val", {"input_size": (1, SIDE, SIDE)}, size=SIDE).read(4)
    scene = (DigitScenesDataset("val", 1).read(0)[0][0] / 4 + 0.5).clamp(0, 1)
    FOLDER.mkdir(exist_ok=True)
    for mechanism in sys.argv[1:] or zoo.MECHANISMS:
        name, stage = network(mechanism), STAGES.get(mechanism, 0)
        model, info = load_trained(trained(name))
        picture = Image.fromarray((scene * 255).byte().numpy()) if name == "attention_unet" else digit
        seen = entropies(model) if mechanism == "removal" else mechanisms(model, info, picture)[stage]
        path = FOLDER / f"{mechanism}.png"
        seen.picture.quantize(COLOURS).save(path, optimize=True)
        print(f"{path}: {seen.title}. {seen.caption}")


if __name__ == "__main__":
    main()

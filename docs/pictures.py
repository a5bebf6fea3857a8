"""Makes the pictures of the mechanisms' pages: trains each small network on digits for some minutes in all, and looks at one digit.

    python docs/pictures.py            # or: python docs/pictures.py hilo sk
"""
import sys
from pathlib import Path

from PIL import Image

import zoo
from zoo.checkpoints import load_trained
from zoo.mm import train
from zoo.mm.checkpoint import latest_checkpoint
from zoo.mm.datasets import DigitsDataset
from zoo.mm.mask_datasets import DigitScenesDataset
from zoo.seeing.classifiers import mechanisms

SIDE, EPOCHS, COLOURS = 64, 6, 96
FOLDER = Path(__file__).parent / "pictures"
STAGES = {"atconv": 1, "gates": -1, "routing": 1, "sk": 1}  # which stage is shown, where it is not the first


def network(mechanism: str) -> str:
    return "attention_unet" if mechanism == "gates" else zoo.list_models("*_nano*", mechanism)[0]


def trained(name: str) -> Path:
    """The checkpoint of a network, trained on digits of `SIDE` pixels unless it was."""
    options = [f"train_cfg.max_epochs={EPOCHS}", f"train_cfg.val_interval={EPOCHS}"]
    if name != "attention_unet":
        for part in ("train", "val"):
            options += [f"{part}_dataloader.dataset.size={SIDE}", f"{part}_dataloader.dataset.transform.input_size=(1,{SIDE},{SIDE})"]
    if name.startswith(("deit", "vidat")):
        options.append(f"model.args.img_size={SIDE}")
    folder, _ = train(f"{name}_digits", work_dir=Path("work_dirs/pictures") / name, resume="auto", cfg_options=options)
    return latest_checkpoint(folder)


def main() -> None:
    digit, _ = DigitsDataset("val", {"input_size": (1, SIDE, SIDE)}, size=SIDE).read(4)
    scene = (DigitScenesDataset("val", 1).read(0)[0][0] / 4 + 0.5).clamp(0, 1)
    FOLDER.mkdir(exist_ok=True)
    for mechanism in sys.argv[1:] or zoo.MECHANISMS:
        name, stage = network(mechanism), STAGES.get(mechanism, 0)
        model, info = load_trained(trained(name))
        picture = Image.fromarray((scene * 255).byte().numpy()) if name == "attention_unet" else digit
        seen = mechanisms(model, info, picture)[stage]
        path = FOLDER / f"{mechanism}.png"
        seen.picture.quantize(COLOURS).save(path, optimize=True)
        print(f"{path}: {seen.title}. {seen.caption}")


if __name__ == "__main__":
    main()

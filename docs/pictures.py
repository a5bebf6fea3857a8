"""Makes the pictures of pages and guides: trains each small network on digits for some minutes in all, and looks at one digit.

    python docs/pictures.py            # or: python docs/pictures.py hilo sk
"""
import sys
from pathlib import Path

import timm
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import zoo
from zoo.checkpoints import load_trained
from zoo.mm import train
from zoo.mm.checkpoint import latest_checkpoint
from zoo.mm.datasets import DigitsDataset
from zoo.mm.mask_datasets import DigitScenesDataset
from zoo.modules import evaluating
from zoo.seeing.classifiers import mechanisms
from zoo.seeing.figures import new_figure, render
from zoo.seeing.page import Seen

ELSEWHERE = ("msinet",)  # made by a program of benchmarks/ of that page
SIDE, EPOCHS, COLOURS = 64, 6, 96
FOLDER = Path(__file__).parent / "pictures"
STAGES = {"atconv": 1, "gates": -1, "moh": 1, "routing": 1, "sk": 1}  # which stage is shown, where it is not the first


def network(mechanism: str) -> str:
    return "attention_unet" if mechanism == "gates" else zoo.list_models("*_nano*", mechanism)[0]


def trained(name: str) -> Path:
    """The checkpoint of a network, trained on digits of `SIDE` pixels unless it was; where attention may go, with all of it."""
    options = ["model.changes=[]", "custom_hooks=[{'type':'ModelEMAHook','decay':0.98}]"] if name.startswith("lambda") else []
    epochs = 5 * EPOCHS if name.startswith("lambda") else EPOCHS  # entropies of what has hardly learned are of nothing
    options += [f"train_cfg.max_epochs={epochs}", f"train_cfg.val_interval={epochs}"]
    if name != "attention_unet":
        for part in ("train", "val"):
            options += [f"{part}_dataloader.dataset.size={SIDE}", f"{part}_dataloader.dataset.transform.input_size=(1,{SIDE},{SIDE})"]
    if "deit" in name or name.startswith("vidat"):
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


def spectral_norms() -> Seen:
    """Two small transformers on digits, at a rate that is too high for attention, with plain weights and with those of σReparam."""
    data = load_digits()
    images, labels = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1, torch.tensor(data.target)
    figure, (left, right) = new_figure(2)
    for name in ("plain", "σReparam"):
        torch.manual_seed(0)
        vit = timm.create_model("vit_tiny_patch16_224", img_size=8, patch_size=2, in_chans=1, embed_dim=48, depth=6, num_heads=3,
                                num_classes=10)
        zoo.replace_attention(vit, "softmax")  # which tells its weights
        if name != "plain":
            zoo.reparametrize(vit, where="blocks")
        optimizer, order = torch.optim.AdamW(vit.parameters(), 5e-3), torch.Generator().manual_seed(0)
        seen = []
        for step in range(301):
            if step % 20 == 0:
                with evaluating(vit), torch.no_grad(), zoo.capture(vit) as maps:
                    right_ones = vit(images[1437:]).argmax(1) == labels[1437:]
                weights = torch.stack([found["attention"] for found in maps.values()])
                entropy = -(weights * weights.clamp(min=1e-12).log2()).sum(-1).mean()
                seen.append((step, entropy.item(), 100 * right_ones.float().mean().item()))
            batch = torch.randint(1437, (64,), generator=order)
            optimizer.zero_grad()
            cross_entropy(vit(images[batch]), labels[batch]).backward()
            optimizer.step()
        steps, entropies_, accuracies = zip(*seen, strict=True)
        left.plot(steps, entropies_, label=name)
        right.plot(steps, accuracies, label=name)
    left.set(title="attention's entropy", xlabel="step", ylabel="bits, mean of all rows", ylim=(0, None))
    right.set(title="held-out digits", xlabel="step", ylabel="right, %", ylim=(0, 100))
    for each in (left, right):
        each.set_axis_on()
        each.legend()
    return Seen("spectral_norms", "Attention's entropy", "Weights of attention in training at a rate of 0.005.", render(figure))


OTHERS = {"sigma_reparam": spectral_norms}  # pictures of guides


def main() -> None:
    digit, _ = DigitsDataset("val", {"input_size": (1, SIDE, SIDE)}, size=SIDE).read(4)
    scene = (DigitScenesDataset("val", 1).read(0)[0][0] / 4 + 0.5).clamp(0, 1)
    FOLDER.mkdir(exist_ok=True)
    for mechanism in sys.argv[1:] or [*(name for name in zoo.MECHANISMS if name not in ELSEWHERE), *OTHERS]:
        if mechanism in OTHERS:
            seen = OTHERS[mechanism]()
        else:
            name, stage = network(mechanism), STAGES.get(mechanism, 0)
            model, info = load_trained(trained(name))
            picture = Image.fromarray((scene * 255).byte().numpy()) if name == "attention_unet" else digit
            seen = entropies(model) if mechanism == "removal" else mechanisms(model, info, picture)[stage]
        path = FOLDER / f"{mechanism}.png"
        seen.picture.quantize(COLOURS).save(path, optimize=True)
        print(f"{path}: {seen.title}. {seen.caption}")


if __name__ == "__main__":
    main()

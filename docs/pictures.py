"""Makes the pictures of pages and guides: trains each small network on digits for some minutes in all, and looks at one digit.

    python docs/pictures.py            # or: python docs/pictures.py hilo sk
"""
import copy
import sys
from pathlib import Path
from typing import cast

import numpy as np
import timm
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy, interpolate

import zoo
from benchmarks import thin_structures
from zoo.checkpoints import ModelInfo, load_trained
from zoo.layers import connectivity_target
from zoo.mm import train
from zoo.mm.checkpoint import latest_checkpoint
from zoo.mm.datasets import DigitsDataset
from zoo.mm.mask_datasets import DigitScenesDataset
from zoo.mm.saliency import PhotographScenesDataset
from zoo.models.inspyrenet import scaled
from zoo.modules import evaluating
from zoo.reading.photographs import photographs
from zoo.reading.shrinking import enlarge, shrink, whole
from zoo.seeing.classifiers import mechanisms
from zoo.seeing.figures import new_figure, render
from zoo.seeing.page import Seen

ELSEWHERE = ("msinet", "sum")  # made by a program of benchmarks/ of that page
SIDE, EPOCHS, COLOURS = 64, 6, 96
FOLDER = Path(__file__).resolve().parent / "pictures"
STAGES = {"atconv": 1, "gates": -1, "moh": 1, "routing": 1, "sk": 1}  # which stage is shown, where it is not the first


def network(mechanism: str) -> str:
    return "attention_unet" if mechanism == "gates" else zoo.list_models("*_nano*", mechanism)[0]


def cutouts(model: nn.Module) -> Seen:
    """Held-out scenes, one to a column: the picture, the coarsest probabilities, the finest, and the object on white."""
    data, columns = PhotographScenesDataset("val", 6, size=SIDE), []
    for i in range(6):
        with torch.no_grad():
            pyramid = model.pyramid(data.read(i)[0][None])
        picture, alpha = data.scenes.read(i)[0] / 255, scaled(pyramid.d0)[0, 0, ..., None].numpy()
        grey = [interpolate(d.sigmoid(), (SIDE, SIDE))[0, 0, ..., None].expand(-1, -1, 3).numpy() for d in (pyramid.d3, pyramid.d0)]
        columns.append(np.concatenate([picture, *grey, alpha * picture + 1 - alpha]))
    sheet = Image.fromarray((255 * np.concatenate(columns, 1)).astype(np.uint8))
    return Seen("cutouts", "Digits on photographs", "Held-out pictures, the coarsest answer, the finest, and what is cut out.",
                sheet.resize((sheet.width * 3 // 2, sheet.height * 3 // 2), Image.Resampling.BILINEAR))


def trained(name: str) -> Path:
    """The checkpoint of a network, trained on digits of `SIDE` pixels unless it was; where attention may go, with all of it."""
    options = ["model.changes=[]", "custom_hooks=[{'type':'ModelEMAHook','decay':0.98}]"] if name.startswith("lambda") else []
    if name.startswith("inspyrenet"):
        folder, _ = train(f"{name}_digits", work_dir=Path("work_dirs/pictures") / name, resume="auto")
        return latest_checkpoint(folder)
    epochs = 5 * EPOCHS if name.startswith("lambda") else 2 if name.startswith("vmamba") else EPOCHS  # entropies want more, scans take long
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


def replaced() -> Seen:
    """What the class token of a small vision transformer attends to in a digit, by what stands in the place of softmax."""
    data = load_digits()
    images = nn.functional.interpolate(torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1, size=(32, 32), mode="bilinear")
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=2, in_chans=1, embed_dim=48, depth=2, num_heads=3,
                            num_classes=10)
    optimizer = torch.optim.AdamW(vit.parameters(), 2e-3)
    for _ in range(400):
        batch = torch.randint(1437, (32,))
        optimizer.zero_grad()
        cross_entropy(vit(images[batch]), torch.tensor(data.target)[batch]).backward()
        optimizer.step()
    digit = images[1437 + 4, None]
    blocks = dict(grid=(16, 16), block_size=(16, 16), shares=(0.1, 0.2, 0.3, 0.6))
    figure, axes = new_figure(8)
    for each, name in zip(axes, ("softmax", "entmax15", "sparsemax", "entmax", "cog", "rela", "hedgehog", "pyramid_sparse"), strict=True):
        changed = zoo.replace_attention(copy.deepcopy(vit).eval(), name, "blocks.1", **(blocks if name == "pyramid_sparse" else {}))
        with torch.no_grad(), zoo.capture(changed) as maps:
            changed(digit)
        seen = maps["blocks.1.attn.mechanism"]["attention"][0, 0]
        weights = seen[150 if name == "pyramid_sparse" else 0, 1:].reshape(16, 16)
        each.imshow(digit[0, 0], cmap="gray", extent=(0, 16, 16, 0), alpha=0.5)
        limit = weights.abs().max().item()
        each.imshow(weights, cmap="RdBu_r", vmin=-limit, vmax=limit, extent=(0, 16, 16, 0), alpha=0.7)
        each.set_title(name, fontsize=8)
    return Seen("replaced", "Attention by mechanism", "The class token's weights of patches (pyramid_sparse: one patch's).", render(figure))


def connections() -> Seen:
    """A drawn picture of thin branches, as benchmarks/thin_structures.py has them, and what a network is to say of them."""
    behind = thin_structures.photographs(thin_structures.MEASURED_ON)
    pictures, labels = thin_structures.batch(behind, 8, 64, np.random.default_rng(5))
    at = int(labels.sum((1, 2)).argmax())
    figure, (left, right) = new_figure(2)
    left.imshow(pictures[at, 0].numpy(), cmap="gray")
    drawn = right.imshow(connectivity_target(labels[at, None, None])[0].sum(0).numpy(), cmap="magma")
    figure.colorbar(drawn, ax=right, shrink=0.8)
    return Seen("connections", "Connections", "The picture, and to how many neighbours every pixel is connected.", render(figure))


def restoring(name: str, epochs: int) -> tuple[nn.Module, torch.Tensor]:
    """A small network that has learned from seven photographs, and a part of a held-out one, made small, (3, H, W)."""
    options = [f"model.name={name}", f"train_cfg.max_epochs={epochs}"]
    folder, _ = train("a2n_nano_x2_photographs", work_dir=Path("work_dirs/pictures") / name, resume="auto", cfg_options=options)
    model, _ = load_trained(cast(Path, latest_checkpoint(folder)))
    return model, shrink(photographs("val")["chelsea"][:, 60:180, 120:300], 2)


def gates_of_pixels() -> Seen:
    """What a network is given, a gate of A2N over it, and its answer beside interpolation."""
    model, given = restoring("a2n_nano_x2", 2)
    with torch.no_grad(), zoo.capture(model) as maps:
        answer = whole(model(given[None].float())[0])
    gate = maps["blocks.1.attention"]["gate"][0].mean(0)
    figure, axes = new_figure(4)
    for axis, (title, shown) in zip(axes, {"given": given, "a gate": gate, "bicubic": enlarge(given, 2), "a2n_nano_x2": answer}.items(),
                                    strict=True):
        axis.imshow(shown if shown.ndim == 2 else shown.permute(1, 2, 0), interpolation="nearest")
        axis.set(title=title)
    weights = ", ".join(f"{maps[f'blocks.{i}']['weights'][0, 0]:.3f}" for i in range(len(model.blocks)))
    return Seen("gates", "Gates of pixels", f"Weights of the branches with attention: {weights}.", render(figure))


def layers_and_gates() -> Seen:
    """Which groups of HAN attend to which, and its gates over channels and positions."""
    model, given = restoring("han_nano_x2", 1)
    with torch.no_grad(), zoo.capture(model) as maps:
        model(given[None].float())
    figure, axes = new_figure(2)
    axes[0].imshow(maps["layers"]["attention"][0], vmin=0, vmax=1)
    axes[0].set(title="attention between layers", xlabel="to layer", ylabel="of layer")
    axes[0].set_axis_on()
    axes[1].imshow(maps["channel_spatial"]["gate"][0].mean(0))
    axes[1].set(title="gates of channels and positions, mean")
    gammas = f"γ of the layers {model.layers.gamma.item():.2g}, of channels and positions {model.channel_spatial.gamma.item():.2g}"
    return Seen("layers", "Holistic attention", f"{gammas}.", render(figure))


OWN = {"a2n": gates_of_pixels, "holistic": layers_and_gates}  # of mechanisms that name no classes
def parts() -> Seen:
    """A digit that was never seen over a photograph, in the network of `benchmarks.ifam_backgrounds`."""
    sys.path.append(str(FOLDER.parents[1]))
    from benchmarks import ifam_backgrounds  # no part of the package
    model = ifam_backgrounds.trained("masked", seed=0).eval()
    data = ifam_backgrounds.Composed("val", ifam_backgrounds.photographs())
    image = data.draw(torch.tensor([9]), torch.tensor([1]), torch.Generator().manual_seed(0))[0] * 0.3 + 0.4
    side = ifam_backgrounds.SIDE
    config = dict(input_size=(3, side, side), mean=(0.4,) * 3, std=(0.3,) * 3, interpolation="bilinear", crop_pct=1.0, crop_mode="center")
    picture = Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())
    return mechanisms(model, ModelInfo("iFAM", (), config), picture)[0]


OTHERS = {"replaced": replaced, "connectivity": connections, "sigma_reparam": spectral_norms}  # drawn otherwise, or pictures of guides


def main() -> None:
    digit, _ = DigitsDataset("val", {"input_size": (1, SIDE, SIDE)}, size=SIDE).read(4)
    scene = (DigitScenesDataset("val", 1).read(0)[0][0] / 4 + 0.5).clamp(0, 1)
    FOLDER.mkdir(exist_ok=True)
    for mechanism in sys.argv[1:] or list(dict.fromkeys([*(name for name in zoo.MECHANISMS if name not in ELSEWHERE), *OTHERS])):
        if mechanism in OWN | OTHERS:
            seen = (OWN | OTHERS)[mechanism]()
        elif mechanism == "parts":
            seen = parts()
        else:
            name, stage = network(mechanism), STAGES.get(mechanism, 0)
            model, info = load_trained(trained(name))
            picture = Image.fromarray((scene * 255).byte().numpy()) if name == "attention_unet" else digit
            own = {"removal": entropies, "inspyrenet": cutouts}.get(mechanism)
            seen = own(model) if own else mechanisms(model, info, picture)[stage]
        path = FOLDER / f"{mechanism}.png"
        seen.picture.quantize(COLOURS).save(path, optimize=True)
        print(f"{path}: {seen.title}. {seen.caption}")


if __name__ == "__main__":
    main()

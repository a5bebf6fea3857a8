"""Random models, images and options: each works or is refused by a sentence of ours, never by a crash, a NaN or a wrong shape.

ZOO_FUZZ says how many are drawn, ZOO_FUZZ_SEED from which seed on; a failure names its own.
"""
import os
import random
import traceback
from pathlib import Path

import pytest
import timm
import torch

import zoo

ROOT = Path(__file__).parents[2]
DRAWS, SEED = int(os.environ.get("ZOO_FUZZ", "500")), int(os.environ.get("ZOO_FUZZ_SEED", "0"))
LIGHT = zoo.list_models("*_nano*")
DENSE = [name for name in LIGHT if zoo.models.is_dense(name)]  # whose answer is a map, and which have no features
UNETS = zoo.list_models("*_nano*", mechanism="gates")
PICTURES = [name for name in DENSE if name.startswith(("a2n", "han"))]  # whose answer is a picture
SIDES = (1, 2, 7, 16, 31, 32, 33, 48, 57, 64)
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "transposed": lambda x: x.mT.contiguous().mT,
    "every other": lambda x: x.repeat_interleave(2, -1)[..., ::2],
}


def draw(seed: int) -> dict:
    """One combination: of `seed` alone, so that it can be repeated alone."""
    rng = random.Random(seed)
    case = dict(
        model=rng.choice(LIGHT), size=(rng.choice(SIDES), rng.choice(SIDES)), batch=rng.choice((0, 1, 2, 3)),
        in_chans=rng.choice((1, 3, 5)),
        dtype=rng.choice((torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16)), layout=rng.choice(sorted(LAYOUTS)),
        way=rng.choice(("logits", "logits", "train", "features_only", "intermediates", "autocast")),
        args=dict(num_classes=rng.choice((0, 1, 10)), drop_path_rate=rng.choice((0.0, 0.3)), drop_rate=rng.choice((0.0, 0.5))),
    )
    if rng.random() < 0.2:
        case["args"]["global_pool"] = rng.choice(("avg", "max", "avgmax"))
    if case["way"] == "autocast":
        case["dtype"] = torch.float32
    if case["way"] == "train":
        case["batch"] = max(case["batch"], 2)  # torch's batch norm refuses one value per channel
        case["grad_checkpointing"] = rng.random() < 0.5
    if case["way"] == "features_only":
        case["args"] = dict(out_indices=rng.choice(((0,), (1, 3), (-1,), (0, 1, 2, 3))))
    if case["model"] in DENSE:
        case["way"] = case["way"] if case["way"] in ("train", "autocast") else "logits"
        case["args"] = {} if case["model"] in PICTURES else dict(num_classes=rng.choice((1, 4)))
    if case["model"].startswith("inspyrenet"):
        case["args"] = dict(num_classes=1, reshapes=rng.choice(("as_trained", "meant")))
    if case["model"] == "dconnnet_nano":
        case["args"]["drop_rate"] = rng.choice((0.0, 0.3))
    if case["model"].startswith("sum"):
        case["args"] = dict(num_classes=1, conditions=rng.choice((1, 4)), drop_path_rate=rng.choice((0.0, 0.3)))
    if case["model"].startswith("msinet"):
        case["args"] = dict(num_classes=1, dim=rng.choice((8, 20)))
    if case["model"] in UNETS:
        case["args"] = dict(num_classes=rng.choice((1, 4)), num_gates=rng.choice((0, 1, 2)), light_decoder=rng.random() < 0.5)
        if "3d" in case["model"]:
            case["size"] = (rng.choice(SIDES[:5]), *(min(side, 33) for side in case["size"]))
        else:
            case["args"]["connectivity"] = rng.random() < 0.2
    return case


def run(case: dict, seed: int) -> None:
    torch.manual_seed(seed)
    features = case["way"] == "features_only"
    model = timm.create_model(case["model"], in_chans=case["in_chans"], features_only=features, **case["args"])
    model = model.to(case["dtype"]).train(case["way"] == "train")
    x = LAYOUTS[case["layout"]](torch.randn(case["batch"], case["in_chans"], *case["size"]).to(case["dtype"]))
    if case["way"] == "train":
        model.set_grad_checkpointing(case["grad_checkpointing"])
        # oneDNN's bfloat16 convolutions leave parts of weights' gradients unwritten where a map is one position wide (torch 2.15).
        with torch.backends.mkldnn.flags(enabled=case["dtype"] != torch.bfloat16):
            out = model(x)
            out = out[0] if isinstance(out, tuple) else out
            # As a gradient scaler does where gradients overflow: batch norm over two positions multiplies them by hundreds.
            scale = 2**-12 if case["dtype"] == torch.float16 else 1
            outs = out if isinstance(out, tuple) else (out,)
            sum(scale * one.float().square().mean() for one in outs).backward()
        outs = [*outs, *(p.grad for p in model.parameters() if p.grad is not None)]
        assert len(outs) > 1
    else:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=case["way"] == "autocast"):
            outs = model.forward_intermediates(x)[1] if case["way"] == "intermediates" else model(x)
        outs = outs if isinstance(outs, list) else [outs]
    if case["dtype"] == torch.float16 and case["way"] == "logits" and not all(out.isfinite().all() for out in outs):
        wide = model.double()(x.double())
        assert wide.isfinite().all() and wide.abs().max() > torch.finfo(torch.float16).max, "not finite"
        return  # the weights of an untrained network can lead beyond what float16 holds
    assert all(out.isfinite().all() for out in outs), "not finite"
    if case["way"] in ("features_only", "intermediates"):
        channels = model.feature_info.channels() if features else [info["num_chs"] for info in model.feature_info]
        assert [out.shape[:2] for out in outs] == [(case["batch"], number) for number in channels], [out.shape for out in outs]
        assert all(out.dtype == case["dtype"] for out in outs)
    elif case["model"] in PICTURES:
        assert outs[0].shape == (case["batch"], case["in_chans"], *(model.scale * side for side in case["size"])), outs[0].shape
    else:
        sizes = case["size"] if case["model"] in DENSE else ()
        maps = 8 if case["way"] == "train" and getattr(model, "connectivity", False) else 1
        assert outs[0].shape == (case["batch"], maps * case["args"]["num_classes"] or model.num_features, *sizes), outs[0].shape
        assert case["way"] == "autocast" or outs[0].dtype == case["dtype"]


def is_ours(error: Exception) -> bool:
    """A ValueError or TypeError that our code, or timm's where it builds a model, raised itself."""
    last = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    return isinstance(error, (ValueError, TypeError)) and (ROOT in last.parents or "timm" in last.parts)


@pytest.mark.long
def test_random_combinations(record_property):
    refused = 0
    for seed in range(SEED, SEED + DRAWS):
        case = draw(seed)
        try:
            run(case, seed)
        except Exception as error:
            assert is_ours(error), f"ZOO_FUZZ=1 ZOO_FUZZ_SEED={seed}: {case} ends in {type(error).__name__}: {error}"
            refused += 1
    record_property("said", f"{DRAWS} random combinations from seed {SEED}: {DRAWS - refused} work, {refused} are refused in a sentence")
    assert refused < DRAWS / 4

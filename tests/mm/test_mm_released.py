"""The authors' detectors and segmentors: their names and shapes, from their configs and code, are those that our configs load."""
import json
from pathlib import Path

import pytest

pytest.importorskip("mmdet", reason="needs mmdetection and mmsegmentation: make mm")
import torch
import torch.nn.functional as F
from mmcv.cnn import ConvModule
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from zoo.errors import InputError
from zoo.losses import AttentionDiversificationLoss
from zoo.mm.backbone import TimmBackbone
from zoo.mm.checkpoint import check_fits
from zoo.mm.config import load_config, scope

MANIFESTS = Path(__file__).parents[1] / "golden" / "manifests"
WIDTHS = {"s": (96, 192, 384, 768), "m": (96, 192, 384, 768), "b": (128, 256, 512, 1024)}
Shapes = dict[str, tuple[int, ...]]


def _layers(shapes: Shapes) -> Shapes:
    """Weights of these shapes and, one for each output, their biases."""
    return {f"{name}.{part}": shape if part == "weight" else shape[:1] for name, shape in shapes.items() for part in ("weight", "bias")}


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.{part}": (width,) for part in ("weight", "bias", "running_mean", "running_var")} | {f"{name}.num_batches_tracked": ()}


def _fpn(widths: tuple[int, ...], outs: int) -> Shapes:
    return _layers({f"neck.lateral_convs.{i}.conv": (256, width, 1, 1) for i, width in enumerate(widths)}
                   | {f"neck.fpn_convs.{i}.conv": (256, 256, 3, 3) for i in range(outs)})


def _classifier(manifest: str) -> Shapes:
    """The released classifier without what a backbone leaves out: the last norm and the head."""
    state = json.loads((MANIFESTS / f"{manifest}.json").read_text())["state"]
    return {f"backbone.{name}": tuple(shape) for name, shape in state.items() if not name.startswith(("norm.", "head."))}


def _litv2(size: str, normed: tuple[int, ...]) -> Shapes:
    norms = {f"backbone.norm{i}.{part}": (WIDTHS[size][i],) for i in normed for part in ("weight", "bias")}
    return _classifier(f"litv2_{size}") | norms


def _retinanet(size: str) -> Shapes:
    """No norm for the first map; five maps from the other three, the coarsest two from one another."""
    branches = {f"bbox_head.{branch}_convs.{i}.conv": (256, 256, 3, 3) for branch in ("cls", "reg") for i in range(4)}
    heads = {"bbox_head.retina_cls": (9 * 80, 256, 3, 3), "bbox_head.retina_reg": (9 * 4, 256, 3, 3)}
    neck = {name: (256, WIDTHS[size][3], 3, 3) if name == "neck.fpn_convs.3.conv.weight" else shape
            for name, shape in _fpn(WIDTHS[size][1:], 5).items()}  # the first further map is made of the backbone's last
    return _litv2(size, (1, 2, 3)) | neck | _layers(branches | heads)


def _mask_rcnn(size: str) -> Shapes:
    heads = {
        "rpn_head.rpn_conv": (256, 256, 3, 3), "rpn_head.rpn_cls": (3, 256, 1, 1), "rpn_head.rpn_reg": (12, 256, 1, 1),
        "roi_head.bbox_head.fc_cls": (81, 1024), "roi_head.bbox_head.fc_reg": (320, 1024),
        "roi_head.bbox_head.shared_fcs.0": (1024, 256 * 49), "roi_head.bbox_head.shared_fcs.1": (1024, 1024),
        **{f"roi_head.mask_head.convs.{i}.conv": (256, 256, 3, 3) for i in range(4)},
        "roi_head.mask_head.upsample": (256, 256, 2, 2), "roi_head.mask_head.conv_logits": (80, 256, 1, 1)}
    return _litv2(size, (1, 2, 3)) | _fpn(WIDTHS[size], 4) | _layers(heads)


def _sem_fpn(size: str) -> Shapes:
    """Each map is halved as often as it is coarser than the first: convolution, norm and, between them, upsampling."""
    shapes = _litv2(size, (0, 1, 2, 3)) | _fpn(WIDTHS[size], 4) | _layers({"decode_head.conv_seg": (150, 128, 1, 1)})
    for scale in range(4):
        for step in range(max(1, scale)):
            place = f"decode_head.scale_heads.{scale}.{2 * step}"
            shapes |= {f"{place}.conv.weight": (128, 128 if step else 256, 3, 3)} | _norm(f"{place}.bn", 128)
    return shapes


def _tap_fan() -> Shapes:
    """Their SegFormer head: linear layers, one norm; a `conv_seg` of mmsegmentation's base class that nothing uses."""
    linear = {f"decode_head.linear_c{i + 1}.proj": (768, width) for i, width in enumerate((128, 256, 448, 448))}
    return _classifier("tap_fan_base_16_p4_hybrid") | _layers(linear) | _norm("decode_head.linear_fuse.bn", 768) | {
        "decode_head.linear_fuse.conv.weight": (768, 4 * 768, 1, 1),
        **_layers({"decode_head.linear_pred": (19, 768, 1, 1), "decode_head.conv_seg": (19, 256, 1, 1)})}


WINDOWS = {"": [], "_ws_4": ["model.backbone.args.windows=(None, None, 4, 1)"]}
RELEASED = {
    **{f"retinanet_litv2_{size}_fpn_1x_coco{windows}.pth": (f"retinanet_litv2-{size}_fpn_1x_coco", options, _retinanet(size))
       for size in WIDTHS for windows, options in WINDOWS.items()},
    **{f"mask_rcnn_litv2_{size}_fpn_1x_coco{windows}.pth": (f"mask-rcnn_litv2-{size}_fpn_1x_coco", options, _mask_rcnn(size))
       for size in WIDTHS for windows, options in WINDOWS.items()},
    **{f"litv2_{size}_fpn_r50_512x512_80k_ade20k.pth": (f"sem-fpn_litv2-{size}_4xb4-80k_ade20k-512x512", [], _sem_fpn(size))
       for size in WIDTHS},
    "tapadl_fan_base_segmentation.pth": ("segformer_tap-fan-base_4xb1-160k_cityscapes-1024x1024", [], _tap_fan()),
}


def _built(name: str, options: list[str], device: str) -> nn.Module:
    config = load_config(name, ["data_root=/elsewhere", *options])
    with torch.device(device), scope(config):
        return MODELS.build(config.model)


@pytest.mark.parametrize("released", RELEASED)
def test_a_released_model_is_the_configs(released):
    name, options, shapes = RELEASED[released]
    model = _built(name, options, "meta")
    state = {name: torch.zeros(shape, device="meta") for name, shape in shapes.items()}
    count = sum(value.numel() for value in state.values())
    for place, part in model.named_modules():
        if hasattr(part, "take_authors_names"):
            part.take_authors_names(state, f"{place}.")
    needed = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert needed == {name: tuple(value.shape) for name, value in state.items()}
    assert count - sum(value.numel() for value in state.values()) == (19 * 256 + 19 if "tapadl" in released else 0)
    if windows := options:
        assert any(getattr(part, "window", 1) == 4 for part in model.modules()), windows


def test_tools_take_the_file_as_it_is(tmp_path):
    """Every value arrives, by the engine's loader and torch's; what lacks a weight is refused."""
    name, options, shapes = RELEASED["litv2_s_fpn_r50_512x512_80k_ade20k.pth"]
    model = _built(name, options, "cpu")
    state = {name: torch.randn(shape) if shape else torch.tensor(3) for name, shape in shapes.items()}
    torch.save({"meta": {}, "state_dict": state}, tmp_path / "released.pth")
    check_fits(tmp_path / "released.pth", model, whole=True)
    from mmengine.runner.checkpoint import load_state_dict as load_as_the_engine

    for load in (load_as_the_engine, nn.Module.load_state_dict):
        nn.init.zeros_(model.backbone.norms[2].weight)
        load(model, dict(state))
        loaded = model.state_dict()
        assert torch.equal(loaded["backbone.norms.2.weight"], state["backbone.norm2.weight"])
        query = state["backbone.layers.3.blocks.1.attn.l_q.weight"]
        assert torch.equal(loaded["backbone.network.stages.3.blocks.1.attn.lo_q.weight"], query)
        assert torch.equal(loaded["neck.fpn_convs.0.conv.bias"], state["neck.fpn_convs.0.conv.bias"])
        assert sum(value.double().sum() for value in loaded.values()).item() == pytest.approx(
            sum(value.double().sum() for value in state.values()).item())
    del state["backbone.layers.2.blocks.0.mlp.fc1.weight"]
    torch.save({"meta": {}, "state_dict": state}, tmp_path / "incomplete.pth")
    with pytest.raises(InputError, match="of another model: 1 missing"):
        check_fits(tmp_path / "incomplete.pth", model, whole=True)


def test_biformers_detectors_names_arrive():
    backbone = TimmBackbone("biformer_nano", out_norm=True)
    own = {f"backbone.{name}": torch.randn_like(value) if value.is_floating_point() else value
           for name, value in backbone.state_dict().items()}
    authors = {name: value for name, value in own.items() if ".network." not in name}
    theirs = {f"backbone.extra_norms.{i}.{part}": authors[f"backbone.norms.{i}.{part}"] for i in range(4) for part in ("weight", "bias")}
    shapes = json.loads((MANIFESTS / "biformer_tiny.json").read_text())["state"]
    assert "stages.0.0.attn.qkv.qkv.weight" in shapes  # a name of theirs, whose rest is tested with the classifiers
    theirs["backbone.stages.0.0.attn.qkv.qkv.weight"] = own["backbone.network.stages.0.blocks.0.attn.qkv.weight"]
    backbone.take_authors_names(theirs, "backbone.")
    assert theirs.keys() <= own.keys() and all(torch.equal(value, own[name]) for name, value in theirs.items())


def test_segformers_linear_head_computes_what_the_authors_do():
    from zoo.mm.mmseg_parts import LinearSegformerHead

    torch.manual_seed(0)
    widths, dim = (3, 5, 7, 7), 6
    with DefaultScope.overwrite_default_scope("mmseg"):  # where its loss is found
        head = LinearSegformerHead(in_channels=widths, in_index=[0, 1, 2, 3], channels=dim, num_classes=4, norm_cfg=dict(type="BN")).eval()
    linear = [nn.Linear(width, dim) for width in widths]
    fuse, predict = ConvModule(4 * dim, dim, 1, norm_cfg=dict(type="BN")).eval(), nn.Conv2d(dim, 4, 1)
    nn.init.normal_(fuse.bn.running_mean)
    state = {f"decode_head.linear_c{i + 1}.proj.{name}": value
             for i, layer in enumerate(linear) for name, value in layer.state_dict().items()}
    state |= {f"decode_head.linear_fuse.{name}": value for name, value in fuse.state_dict().items()}
    state |= {f"decode_head.linear_pred.{name}": value for name, value in predict.state_dict().items()}
    state |= {"decode_head.conv_seg.weight": torch.zeros(4, 2, 1, 1), "decode_head.conv_seg.bias": torch.zeros(4)}
    nn.ModuleDict({"decode_head": head}).load_state_dict(state)
    maps = [torch.randn(2, width, 8 // 2**scale, 12 // 2**scale) for width, scale in zip(widths, (0, 1, 2, 2), strict=True)]
    projected = [layer(x.flatten(2).mT).mT.unflatten(2, x.shape[2:]) for layer, x in zip(linear, maps, strict=True)]
    resized = [F.interpolate(x, maps[0].shape[2:], mode="bilinear") for x in projected]
    torch.testing.assert_close(head(maps), predict(fuse(torch.cat(resized[::-1], 1))))


def test_the_diversified_segmentor_adds_the_loss_of_its_backbone():
    from reduced import batch, reduced

    config = reduced(load_config("segformer_tap-fan-base_4xb1-160k_cityscapes-1024x1024"))
    losses = []
    for weight in (0.0, 0.5):
        torch.manual_seed(0)
        config.model.update(attention_diversification=weight, attention_threshold=0.5)  # fresh attention is below the usual one
        with scope(config):
            model = MODELS.build(config.model).train()
        data = model.data_preprocessor(batch("mmseg"), True)
        torch.manual_seed(1)
        losses.append(model(**data, mode="loss"))
    _, similarity = AttentionDiversificationLoss(0.5)(model.backbone, data["inputs"])
    assert similarity > 0.01
    torch.testing.assert_close(losses[1].pop("loss_attention_diversification"), 0.5 * similarity)
    assert losses[0].pop("loss_attention_diversification") == 0 and losses[0].keys() == losses[1].keys()
    assert model.backbone(data["inputs"])[3].shape[2:] == model.backbone(data["inputs"])[2].shape[2:]


def test_biformers_batch_norms_and_padding_are_the_authors():
    detection = sorted(path.stem for path in Path(__file__).parents[2].glob("configs/detection/*biformer-*coco.py"))
    segmentation = sorted(path.stem for path in Path(__file__).parents[2].glob("configs/segmentation/*biformer-*ade20k*.py"))
    assert detection and segmentation
    for name in detection + segmentation:
        config = load_config(name)
        attention, detects = config.model.backbone.args.attn_args, name in detection
        assert attention == {"regions": 16 if detects else 8, "mask_padding": False}, name
        assert config.model.backbone.get("norm_eval", False) is detects and config.get("sync_bn") == (None if detects else "torch"), name


def test_norms_of_the_maps_that_ask_for_one():
    backbone = TimmBackbone("litv2_nano", out_norm=(1, 3), norm_eps=1e-5)
    assert [getattr(norm, "eps", None) for norm in backbone.norms] == [None, 1e-5, None, 1e-5]
    with pytest.raises(InputError, match=r"out_norm=\(1, 4\): there are 4 maps"):
        TimmBackbone("litv2_nano", out_norm=(1, 4))

"""Layers and backbones by name in a model file, whose widths are found."""
import copy
import inspect
import math

import pytest
import torch
from torch import nn
from ultralytics.nn.tasks import ClassificationModel, DetectionModel

import zoo.layers
import zoo.yolo
from zoo.errors import InputError
from zoo.yolo.modules import GATES, LAYERS, OUT_WIDTH, Backbone, Layer

NEEDED = {"TokenMixing": {"num_heads": 4}, "ChannelProcessing": {"num_heads": 4, "hidden": 32}, "FullyAttentionalBlock": {"num_heads": 4}}
SCALES = {"n": [0.5, 0.25, 1024], "s": [0.5, 0.5, 1024], "x": [1.0, 1.5, 512]}


def model_of(*rows, scale="n", head=()):
    """A classifier of 64·width channels, then these rows."""
    return ClassificationModel({"nc": 10, "scales": SCALES, "scale": scale, "backbone": [[-1, 1, "Conv", [64, 3, 2]], *copy.deepcopy(rows)],
                                "head": [*head, [-1, 1, "Classify", ["nc"]]]}, verbose=False)


def test_every_layer_has_a_place():
    of_rows = {  # of tokens, or of several maps
        "DualAttention", "EfficientProbing", "HedgehogAttention", "LayerAttention", "MixtureOfHeadAttention", "MixtureOfHeads",
        "MultipleInstanceHead", "NormalizedAttention", "PartDiscovery", "PyramidSparseAttention", "RelationalAttention", "SelfAttention",
        "SimPool", "SparsifinerAttention", "SymbolicAttention"}
    of_rows |= {"SelectiveScan2d"}  # whose scans take as long as their maps are large
    of_rows |= {"AxialAttention", "PyramidAxialAttention", "ScaleInvariantContextAttention"}  # of InSPyReNet
    layers = {name for name in zoo.layers.__all__ if isinstance(getattr(zoo.layers, name), type)}
    assert layers - of_rows == set(LAYERS)


@pytest.mark.parametrize("name", [name for name in LAYERS if name not in GATES])
@pytest.mark.parametrize(("scale", "width"), [("n", 16), ("s", 32)])
def test_widths_are_found_and_scaled_with_the_size(name, scale, width):
    arguments = [128] if name == "DeformableTokenMerging" else NEEDED.get(name, [])
    model = model_of([-1, 1, name, arguments], [-1, 1, "Conv", [64, 1, 1]], scale=scale)
    layer, after = model.model[1], model.model[2]
    out = 2 * width if name == "DeformableTokenMerging" else width
    assert type(layer) is Layer and type(layer.layer) is getattr(zoo.layers, name)
    assert after.conv.in_channels == out and layer.np == sum(p.numel() for p in layer.parameters())
    model.train()(torch.rand(2, 3, 32, 48)).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


@pytest.mark.parametrize("name", OUT_WIDTH)
def test_widths_that_are_given_are_scaled_as_those_of_convolutions(name):
    for scale, (_, width, most) in SCALES.items():
        model = model_of([-1, 1, name, [640]], [-1, 1, "Conv", [640, 1, 1]], scale=scale)
        assert model.model[2].conv.in_channels == math.ceil(min(640, most) * width / 8) * 8 == model.model[2].conv.out_channels


def test_arguments_are_a_list_a_mapping_or_both():
    forms = [2, 5, 3], {"num_heads": 2, "regions": 5, "topk": 3}, [2, {"regions": 5, "topk": 3}]
    layers = [model_of([-1, 1, "BiLevelRoutingAttention", arguments]).model[1].layer for arguments in forms]
    assert {(layer.num_heads, layer.regions, layer.topk) for layer in layers} == {(2, (5, 5), 3)}


def test_names_of_the_parsers_variables_are_no_arguments():
    """The parser would take `scale` for the size of the model, n, and evaluate what is in a list."""
    assert model_of([-1, 1, "BiLevelRoutingAttention", {"scale": 0.25}]).model[1].layer.scale == 0.25
    assert model_of([-1, 1, "PolarizedSelfAttention", ["sequential"]]).model[1].layer.layout == "sequential"


def test_rows_may_be_repeated_and_read_any_row_before():
    model = model_of([-1, 1, "Conv", [128, 3, 2]], [0, 4, "DAS", []], [-1, 1, "Conv", [64, 1, 1]])
    assert isinstance(model.model[2], nn.Sequential) and len(model.model[2]) == 2  # 4 · depth
    assert {layer.layer.dim for layer in model.model[2]} == {16}
    assert model.eval()(torch.rand(1, 3, 32, 32))[0].shape == (1, 10)


@pytest.mark.parametrize("name", GATES)
def test_gates_take_a_map_and_a_signal(name):
    model = model_of([-1, 1, "Conv", [128, 3, 2]], [[0, -1], 1, name, []], [[2, 0], 1, "Concat", [1]]).eval()
    gate = model.model[2]
    assert (gate.f, model.model[3].f) == ([0, -1], [2, 0]) and set(model.save) == {0, 2}
    layer = gate.layer if name == "AttentionGate" else gate.layer.gates[0]
    assert (layer.dim, layer.gate_dim) == (16, 32)
    seen = {}
    for number, row in enumerate(model.model):
        row.register_forward_hook(lambda module, args, out, number=number: seen.update({number: out}))
    model(torch.rand(1, 3, 33, 48))
    assert torch.equal(seen[2], gate.layer(seen[0], seen[1])) and seen[3].shape[1] == 32


@pytest.mark.parametrize("name", ["biformer_nano", "litv2_nano", "resnet18", "swin_tiny_patch4_window7_224"])
def test_a_backbones_maps_are_rows(name):
    arguments = {"strict_img_size": False} if name.startswith("swin") else {"drop_path_rate": 0.1} if "nano" in name else {}
    model = DetectionModel({"nc": 4, "backbone": [[-1, 1, name, arguments], *([0, 1, "FeatureMap", [i]] for i in (-3, -2, -1))],
                            "head": [[[1, 2, 3], 1, "Detect", ["nc"]]]}, verbose=False).eval()
    backbone = model.model[0]
    assert type(backbone) is Backbone and model.stride.tolist() == backbone.strides[-3:] == [8, 16, 32]
    assert [branch[0].conv.in_channels for branch in model.model[-1].cv2] == backbone.channels[-3:]
    maps = backbone(torch.rand(1, 3, 64, 64))
    assert [tuple(y.shape[1:]) for y in maps] == [(c, 64 // s, 64 // s) for c, s in zip(backbone.channels, backbone.strides, strict=True)]


def test_a_layer_after_the_sums_of_a_block_keeps_what_the_model_computes():
    plain = model_of([-1, 2, "C3k2", [256, True]]).eval()
    for name in LAYERS:
        if name in GATES or name == "DeformableTokenMerging":
            continue
        model = model_of([-1, 2, "C3k2+" + name, [256, True, NEEDED.get(name, {})]]).eval()
        rest = model.load_state_dict(plain.state_dict(), strict=False)
        assert not rest.unexpected_keys and all(".attached." in key for key in rest.missing_keys)
        attached = [module for path, module in model.named_modules() if path.endswith(".attached")]
        assert [type(module[0].layer.layer).__name__ for module in attached] == [name] * 2
        image = torch.rand(2, 3, 64, 64)
        assert torch.equal(model(image)[0], plain(image)[0])
        for module in attached:
            for path, parameter in module.named_parameters():
                if path.endswith(("gate", "gamma")):  # what keeps the outputs at the start
                    nn.init.ones_(parameter)
        assert not torch.equal(model(image)[0], plain(image)[0])


def test_where_says_which_parts_of_a_block_are_followed():
    model = model_of([-1, 2, "C2PSA+ContextBroadcast", [64, {"where": "m.*", "scaled": True}]])
    assert [path for path, _ in model.named_modules() if path.endswith(".attached")] == ["model.1.m.0.attached"]


ROWS = {
    "DAS": [-1, 1, "DSA", []],
    "biformer_nano": [-1, 1, "biformer_nan", []],
    "there is no argument 'top_k'": [-1, 1, "BiLevelRoutingAttention", {"top_k": 4}],
    "is given twice, 2 and 4": [-1, 1, "BiLevelRoutingAttention", [2, {"num_heads": 4}]],
    "at most 3 arguments, ratio, kernel_size, group_width, without its width": [-1, 1, "DAS", [16, 3, 3, 3]],
    "the argument num_heads is missing": [-1, 1, "FullyAttentionalBlock", []],
    "the width of its output, as Conv has it": [-1, 1, "DeformableTokenMerging", []],
    "it takes two maps": [-1, 1, "AttentionGate", []],
    "it takes one map": [[-1, 0], 1, "DAS", []],
    "row -1 is none": [-1, 1, "FeatureMap", [0]],
    "there can be one of it, not 2": [-1, 2, "DeformableTokenMerging", [64]],
    "has no forward_intermediates": [-1, 1, "attention_unet_nano", []],
    "does not take these arguments": [-1, 1, "biformer_nano", {"topck": 3}],
    "the arguments of a backbone are a mapping": [-1, 1, "biformer_nano", [3]],
    "there is no layer 'DSA'": [-1, 1, "C3k2+DSA", [64]],
    "before the + is a block of Ultralytics": [-1, 1, "DAS+HaloAttention", []],
    "and resnet18 is none": [-1, 1, "resnet18+DAS", []],
    "row .-1, 0. is none": [[-1, 0], 1, "FeatureMap", [0]],
    "no residual blocks": [-1, 1, "Conv+DAS", [64]],
    "num_heads must divide dim": [-1, 1, "HiLoAttention", {"num_heads": 3}],
}


@pytest.mark.parametrize("said", ROWS)
def test_mistakes_end_in_a_sentence(said):
    with pytest.raises(ValueError, match=said.replace("+", r"\+")) as error:
        model_of(ROWS[said])
    assert isinstance(error.value, InputError) or said.startswith("num_heads must")
    assert "\n" not in str(error.value)


def test_a_map_that_a_backbone_does_not_have():
    with pytest.raises(InputError, match="one of 4 maps, at strides 4, 8, 16, 32"):
        model_of([-1, 1, "biformer_nano", []], [-1, 1, "FeatureMap", [4]])


def test_what_is_given_is_left_as_it_was():
    rows = [[-1, 2, "C3k2+DAS", [64, {"ratio": 0.5}]], [-1, 1, "DAS", {"ratio": 0.3}]]
    given = {"nc": 3, "backbone": [[-1, 1, "Conv", [16, 3, 2]], *rows], "head": [[-1, 1, "Classify", ["nc"]]]}
    before = copy.deepcopy(given)
    from ultralytics.nn import tasks
    tasks.parse_model(given, 3, verbose=False)
    assert given == before


def test_registering_again_changes_nothing():
    from ultralytics.nn import tasks
    before = tasks.parse_model, tasks.yaml_model_load
    zoo.yolo.register()
    assert (tasks.parse_model, tasks.yaml_model_load) == before
    assert list(inspect.signature(tasks.parse_model).parameters) == ["d", "ch", "verbose"]

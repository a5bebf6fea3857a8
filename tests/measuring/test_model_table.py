import json

import pytest
import timm
import torch

import zoo
from zoo.errors import InputError
from zoo.measuring import model_table


def test_every_model_has_one_mechanism_or_is_plain():
    by_mechanism = [name for mechanism in zoo.MECHANISMS for name in zoo.list_models(mechanism=mechanism)]
    plain = [name for name in zoo.list_models() if zoo.mechanism_of(name) is None]
    assert sorted(by_mechanism + plain) == sorted(zoo.list_models())
    registered = {name for name in timm.list_models() if timm.model_entrypoint(name).__module__.startswith("zoo.")}
    assert set(zoo.list_models()) == registered
    assert set(plain) == {"unet", "unet3d", *timm.list_models("fan_*"), *timm.list_models("transnext_*")}


@pytest.mark.parametrize(("mechanism", "layer"), [("tap", zoo.layers.TokenAwareAvgPool), ("gates", zoo.layers.AttentionGate)])
def test_models_hold_the_layer_of_their_mechanism(mechanism, layer):
    for name in zoo.list_models(mechanism=mechanism):
        with torch.device("meta"):
            assert any(isinstance(module, layer) for module in timm.create_model(name).modules()), name


def test_models_of_a_mechanism_that_match():
    assert zoo.list_models("*_tiny", mechanism="routing") == ["biformer_tiny"]
    assert zoo.list_models("*_tiny", mechanism="das") == []


@pytest.mark.parametrize(("mechanism", "message"), [("rooting", "did you mean routing"), ("", "there is no mechanism ''; a2n,")])
def test_unknown_mechanisms(mechanism, message):
    with pytest.raises(InputError, match=message):
        zoo.list_models(mechanism=mechanism)


def test_every_reported_number_says_where():
    for family in zoo.MECHANISMS.values():
        assert hasattr(family, "REPORTED_TOP1") == hasattr(family, "REPORTED_IN"), family.__name__


@pytest.mark.parametrize(("name", "expected"), [
    ("das_resnet_nano", ["deform_conv2d"]), ("attnet_nano", ["depthwise_dynamic_conv2d"]), ("sknet_nano", []),
    ("biformer_nano", ["region_means", "region_routes", "routing_attention"]), ("halonet_nano", ["halo_attention"]),
    ("litv2_nano", ["deform_conv2d"]), ("tap_fan_nano", ["token_aware_avg_pool"]), ("vmamba_nano_v0", ["selective_scan"]),
    ("attention_unet_nano", []),
])
def test_kernels_are_those_of_the_modules(name, expected):
    assert model_table.kernels(timm.create_model(name)) == expected


def test_rows_hold_what_is_known(tmp_path, monkeypatch):
    monkeypatch.setattr(model_table, "macs", lambda name: 1_234_000_000)
    side = lambda *seconds: {"seconds": seconds, "peak_memory": 0}  # noqa: E731
    rows = [{"model": "sk_resnet50", "kind": kind, "ours": side(*ours), "rival": side(1.0, 2.0, 4.0)}
            for kind, ours in [("forward", (3.0, 5.0, 4.0)), ("forward + backward", (9.0, 9.0, 9.0))]]
    (tmp_path / "models.json").write_text(json.dumps({"facts": {}, "comparisons": rows}))
    records = {"sk_resnet50": {}, "attnet_t2": {"reason": "so"}, "das_resnet18": {"failure": "no"}}
    (tmp_path / "exports.json").write_text(json.dumps({name: {"versions": {}, **record} for name, record in records.items()}))
    names = ["sk_resnet50", "attnet_t2", "das_resnet18", "biformer_nano", "attention_unet3d_nano"]
    written = model_table.model_table(names, tmp_path).splitlines()
    assert len({line.count("|") for line in written}) == 1
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in written[2:]]
    for row, name in zip(cells, names, strict=True):
        assert row[0] == f"`{name}`" and row[3] == "1.23 G"
    sk, attnet, das, biformer, unet = cells
    assert sk[1] == "[sk](sk.md)" and sk[5].startswith("77.54 %, the paper's table; of `sk_resnet`")
    assert sk[7:11] == ["[theirs](https://github.com/implus/PytorchInsight)", "not stated", "2.50", "any size"]
    assert attnet[8:11] == ["mit", "–", "one size"] and das[5:10] == ["–", das[6], "–", "–", "–"] and das[10] == "no"
    assert biformer[5] == biformer[7] == biformer[9] == biformer[10] == "–"
    assert unet[1] == "[gates](gates.md)" and unet[4] == "64³"


def test_tables_take_their_places_and_no_other(tmp_path, monkeypatch):
    monkeypatch.setattr(model_table, "TABLES", {name: lambda name=name: f"new {name}" for name in ("mechanisms", "models", "none")})
    path, marks = tmp_path / "x.md", {name: model_table.marks(name) for name in ("models", "mechanisms")}
    page = "before\n{}\n{}\n{}\nbetween\n{}\n{}\n{}\nafter\n"
    path.write_text(page.format(marks["models"][0], "old", marks["models"][1], marks["mechanisms"][0], "", marks["mechanisms"][1]))
    assert model_table.write_tables(path) == ["mechanisms", "models"]
    assert path.read_text() == page.format(
        marks["models"][0], "new models", marks["models"][1], marks["mechanisms"][0], "new mechanisms", marks["mechanisms"][1])
    path.write_text(marks["models"][0])
    with pytest.raises(InputError, match="no place for a table"):
        model_table.write_tables(path)

"""Which weights of a file are loaded, by what names, from what formats; and what is done with files that mean harm."""
import argparse
import copyreg
import io
import json
import logging
import os
import pickle
import struct
import sys
import types
import zipfile
from collections import OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from torch import nn

import zoo
from zoo.errors import InputError
from zoo.unpickling import Ignored, _Unpickler
from zoo.weights import load_weights, read, weights_in

NAME = "attnet_nano"


@pytest.fixture(scope="module")
def raw() -> dict:
    torch.manual_seed(1)
    return timm.create_model(NAME).state_dict()


@pytest.fixture(scope="module")
def average(raw) -> dict:
    return {name: value * 2 for name, value in raw.items()}


def make(path: Path, **overlay) -> nn.Module:
    return timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=dict(file=str(path), **overlay))


def same(model: nn.Module, weights: dict) -> bool:
    return all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("key", "average_key"), [("model", "model_ema"), ("state_dict", "state_dict_ema")])
def test_authors_weights_by_default_and_their_average_when_asked_for(tmp_path, raw, average, key, average_key, caplog):
    path = tmp_path / "released.pth"
    torch.save({average_key: average, key: raw, "args": argparse.Namespace(lr=1)}, path)
    with caplog.at_level(logging.INFO, "zoo"):
        assert same(make(path), raw)
    taken = f"{len(raw)} tensors under {key!r}, {average_key!r} left: ema=True takes it"
    assert caplog.messages == [f"weights from {path}: {taken}; licence mit"]
    assert same(make(path, ema=True), average)
    model = timm.create_model(NAME)
    load_weights(model, path)
    assert same(model, raw)
    load_weights(model, path, ema=True)
    assert same(model, average)
    assert "state_dict" not in make(path).pretrained_cfg
    assert make(path).pretrained_cfg["file"] == str(path)


def test_timms_own_reading_takes_the_average_and_refuses_the_authors_names(tmp_path, raw, average):
    """`checkpoint_path`, as the guide says of it: timm picks the weights before the model is there to be asked."""
    torch.save({"state_dict": raw, "state_dict_ema": average}, tmp_path / "timms.pth")
    assert same(timm.create_model(NAME, checkpoint_path=str(tmp_path / "timms.pth")), average)
    assert same(make(tmp_path / "timms.pth"), raw)
    shapes = json.loads((Path(__file__).parents[1] / "golden" / "manifests" / "litv2_s.json").read_text())["state"]
    torch.save({"model": {name: torch.zeros(shape) for name, shape in shapes.items()}}, tmp_path / "authors.pth")
    with pytest.raises(RuntimeError, match="Missing key"):
        timm.create_model("litv2_s", checkpoint_path=str(tmp_path / "authors.pth"))


def test_no_average(tmp_path, raw, average):
    torch.save({"model": raw, "model_ema": None}, tmp_path / "x.pth")
    with pytest.raises(InputError, match=r"x.pth holds no average of the weights \(state_dict_ema or model_ema\), only model"):
        make(tmp_path / "x.pth", ema=True)
    torch.save({"model_ema": average}, tmp_path / "x.pth")  # nothing else to take
    assert same(make(tmp_path / "x.pth"), average)


def test_the_engines_average_is_its_state_dict(tmp_path, raw, average):
    torch.save({"state_dict": average, "ema_state_dict": raw}, tmp_path / "x.pth")
    assert same(make(tmp_path / "x.pth"), average)
    assert same(make(tmp_path / "x.pth", ema=True), average)


@pytest.mark.parametrize("prefix", [
    "module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod.", "model.", "model._orig_mod.", "module.model.", "backbone.",
    "model.module.backbone._orig_mod.", "backbone.network.", "timm_model.",
])
@pytest.mark.parametrize("key", ["state_dict", None])
def test_wrappers_names_are_taken_off(tmp_path, raw, prefix, key):
    weights = {f"{prefix}{name}": value for name, value in raw.items()}
    if "model" in prefix or "backbone" in prefix:
        weights |= {"decode_head.weight": torch.ones(3), "loss.weight": torch.ones(2)}
    torch.save({key: weights} if key else weights, tmp_path / "x.pth")
    assert same(make(tmp_path / "x.pth"), raw)


def test_names_of_the_model_itself_are_left():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.model, self.other = nn.Linear(2, 2), nn.Linear(1, 1)

    state = Wrapped().state_dict()
    assert weights_in(state, own=state).keys() == state.keys()
    load_weights(Wrapped(), state)


class CfgNode(dict):
    """As yacs': a dict with attributes."""


class DictConfig:
    """As omegaconf's: content and metadata of other classes."""

    def __init__(self, content):
        self._content, self._metadata = content, types.SimpleNamespace(ref_type=dict, optional=True)

    def __setstate__(self, state):
        raise AssertionError("called")


def unknown(kind: type, *args) -> object:
    """An object that pickles under a module which is not there to import."""
    module = sys.modules.setdefault("somebody_elses", types.ModuleType("somebody_elses"))
    made = type(kind.__name__, (kind,), {"__module__": "somebody_elses"})
    setattr(module, kind.__name__, made)
    return made(*args)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_what_is_no_tensor_becomes_nothing(tmp_path, raw, zipped, protocol):
    extras = {
        "args": argparse.Namespace(lr=0.1, data=Path("x"), dtype=torch.float16, device=torch.device("cpu")),
        "config": unknown(CfgNode, {"a": {"b": 1}}), "cfg": unknown(DictConfig, {"a": [1]}), "scalar": np.float64(0.5),
        "array": np.arange(3), "epoch": 7, "tuple": (1, "two", None, {"three"}), "default": defaultdict(list, a=[1]), "type": dict,
    }
    torch.save({**extras, "model": OrderedDict(raw)}, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    del sys.modules["somebody_elses"]
    found = read(tmp_path / "x.pth")
    assert (found["epoch"], found["tuple"]) == (7, (1, "two", None, {"three"}))
    for name in ("args", "config", "cfg", "scalar", "array"):
        assert isinstance(found[name], Ignored), name
        assert not vars(found[name])
    assert "somebody_elses" not in sys.modules
    assert same(make(tmp_path / "x.pth"), raw)


def test_a_log_history_becomes_nothing(tmp_path, raw):
    logging_of_engine = pytest.importorskip("mmengine.logging")
    history = logging_of_engine.HistoryBuffer()
    history.update(0.5)
    torch.save({"state_dict": raw, "message_hub": {"loss": history}}, tmp_path / "x.pth")
    assert isinstance(read(tmp_path / "x.pth")["message_hub"]["loss"], Ignored)


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_of_every_kind_are_read_as_they_were(tmp_path, zipped):
    base = torch.arange(12.0)
    saved = {
        "view": base[2:8].view(2, 3), "transposed": base.view(3, 4).T, "parameter": nn.Parameter(base.clone()), "scalar": torch.tensor(3),
        "half": base.half(), "bfloat16": base.bfloat16(), "bool": base > 3, "complex": torch.complex(base, base), "empty": base[:0],
        "uint16": torch.tensor([1, 60000], dtype=torch.uint16), "float8": base.to(torch.float8_e4m3fn), "expanded": torch.ones(1).expand(5),
        "shape": base.view(3, 4).shape,
    }
    if not zipped:
        del saved["uint16"], saved["float8"]  # torch itself cannot read them in this format
    torch.save(saved, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    found = read(tmp_path / "x.pth")
    assert found.keys() == saved.keys()
    assert found.pop("shape") == saved.pop("shape")
    for name, value in saved.items():
        assert (found[name].dtype, found[name].shape, found[name].stride()) == (value.dtype, value.shape, value.stride()), name
        assert torch.equal(found[name].view(torch.uint8) if name == "float8" else found[name],
                           value.view(torch.uint8) if name == "float8" else value), name


CALLED: list = []


def touch(*args, **kwargs):
    CALLED.append(args)
    return {}


class Touching:
    """Whose construction, state and attributes would each leave a trace."""

    def __new__(cls, *args):
        touch(*args)
        return super().__new__(cls)

    def __setstate__(self, state):
        touch(state)

    def __setattr__(self, name, value):
        touch(name)

    def __setitem__(self, name, value):
        touch(name)

    def append(self, value):
        touch(value)

    extend = append


class Reduces:
    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


GLOBAL = {name: f"c{__name__}\n{name}\n".encode() for name in ("touch", "Touching", "CALLED")}
PROGRAMS = {  # pickles by hand, which call, build, set and append in every way that there is
    "reduce": GLOBAL["touch"] + b"(I1\ntR.",
    "newobj": b"\x80\x02" + GLOBAL["Touching"] + b"(I1\nt\x81.",
    "newobj_ex": b"\x80\x04" + GLOBAL["Touching"] + b")}\x92.",
    "obj": b"(" + GLOBAL["Touching"] + b"I1\no.",
    "inst": b"(I1\ni" + GLOBAL["Touching"][1:] + b".",
    "build": b"\x80\x02" + GLOBAL["Touching"] + b")\x81}U\x01aI1\nsb.",
    "build with slots": b"\x80\x02" + GLOBAL["Touching"] + b")\x81N}U\x01aI1\ns\x86b.",
    "build of a class": GLOBAL["Touching"] + b"}U\x01aI1\nsb.",
    "append to a global": GLOBAL["CALLED"] + b"I1\na.",
    "setitem": b"\x80\x02" + GLOBAL["Touching"] + b")\x81U\x01aI1\ns.",
    "appends": b"\x80\x02" + GLOBAL["Touching"] + b")\x81(I1\ne.",
    "additems": b"\x80\x04" + GLOBAL["Touching"] + b")\x81(I1\n\x90.",
    "stack global": b"\x80\x04\x8c" + bytes([len(__name__)]) + __name__.encode() + b"\x8c\x05touch\x93)R.",
    "getattr": b"cbuiltins\ngetattr\n(" + GLOBAL["touch"] + b"U\x08__call__tR)R.",
    "nested": GLOBAL["touch"] + b"(" + GLOBAL["touch"] + b")RtR.",
    "tensor of it": b"ctorch._utils\n_rebuild_parameter\n(" + GLOBAL["touch"] + b"I01\nNtR)R.",
    "subclass of it": b"ctorch._tensor\n_rebuild_from_type_v2\n(" + GLOBAL["touch"] + b"N)NtR.",
    "a state dict of it": b"ccollections\nOrderedDict\n)R}U\x05itemsU\x01xsb.",
    "keys": b"ccollections\nOrderedDict\n(" + GLOBAL["Touching"] + b")\x81tR.",
}


@pytest.fixture
def untouched():
    CALLED.clear()
    yield CALLED
    assert not CALLED


@pytest.mark.parametrize("name", PROGRAMS)
def test_nothing_in_a_pickle_is_called(name, untouched):
    assert pickle.loads(GLOBAL["touch"] + b"(I1\ntR.") == {}  # as Python does
    assert untouched
    untouched.clear()
    unpickler = _Unpickler(io.BytesIO(PROGRAMS[name]), encoding="utf-8")
    unpickler.limit = 1000
    unpickler.load()


@pytest.mark.parametrize("opcode", [b"\x82\x01", b"\x83\x01\x00", b"\x84\x01\x00\x00\x00"])
def test_registered_extensions_are_refused(opcode, untouched):
    copyreg.add_extension(__name__, "touch", 1)
    try:
        with pytest.raises(pickle.UnpicklingError, match="extensions"):
            _Unpickler(io.BytesIO(b"\x80\x02" + opcode + b")R."), encoding="utf-8").load()
    finally:
        copyreg.remove_extension(__name__, "touch", 1)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(("function", "called"), [
    (os.system, "posix.system"), (eval, "builtins.eval"), (__import__, "builtins.__import__"),
    (__import__("shutil").rmtree, "shutil.rmtree"), (__import__("runpy").run_path, "runpy.run_path"),
])
def test_files_made_to_run_something_are_refused(tmp_path, raw, zipped, function, called):
    created = tmp_path / "created"
    hidden = {"deep": [({"x": Reduces(function, (f"touch {created}",))},)]}
    torch.save({"model": raw, "args": hidden}, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    for use in (read, make):
        with pytest.raises(InputError, match=rf"x.pth would run code on loading and is refused: it names {called}"):
            use(tmp_path / "x.pth")
    assert not created.exists()


def test_files_that_would_unpickle_others_inside_do_not(tmp_path, untouched):
    inner = io.BytesIO()
    torch.save(Reduces(touch, (1,)), inner)
    torch.save({"a": Reduces(torch.storage._load_from_bytes, (inner.getvalue(),))}, tmp_path / "x.pth")
    assert isinstance(read(tmp_path / "x.pth")["a"], Ignored)


def test_programs_of_torchscript_are_refused(tmp_path):
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "x.pth")
    with pytest.raises(InputError, match=r"x.pth is a TorchScript program, not a checkpoint"):
        read(tmp_path / "x.pth")


def test_archives_that_grow_are_refused(tmp_path):
    torch.save({"a": torch.zeros(1000)}, tmp_path / "plain.pth")
    with zipfile.ZipFile(tmp_path / "plain.pth") as plain, zipfile.ZipFile(tmp_path / "x.pth", "w", zipfile.ZIP_DEFLATED) as packed:
        for entry in plain.namelist():
            packed.writestr(entry, plain.read(entry) if not entry.endswith("data/0") else bytes(10**7))
    assert (tmp_path / "x.pth").stat().st_size < 10**5
    with pytest.raises(InputError, match=r"x.pth is refused: it would grow on reading"):
        read(tmp_path / "x.pth")


def test_tensors_that_grow_are_refused(tmp_path):
    torch.save({"a": torch.zeros(1).expand(10**6, 10**6)}, tmp_path / "x.pth")
    with pytest.raises(InputError, match=r"x.pth is refused: a tensor is larger than the file"):
        read(tmp_path / "x.pth")


def test_storages_that_grow_are_refused(tmp_path):
    """In the format before archives the pickle says how much memory is asked for before anything is read."""
    torch.save({"a": torch.zeros(3)}, tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    content = (tmp_path / "x.pth").read_bytes()
    assert content.count(b"cpuq\x06K\x03") == 1
    (tmp_path / "x.pth").write_bytes(content.replace(b"cpuq\x06K\x03", b"cpuq\x06J" + struct.pack("<i", 2**31 - 1)))
    with pytest.raises(InputError, match=r"x.pth is refused: tensors are larger than the file"):
        read(tmp_path / "x.pth")


def test_keys_that_take_for_ever_to_hash_are_left():
    nested = b"I1\n" + b"2\x86" * 60  # a pair of a pair of …: 2⁶⁰ numbers for the hash, 60 objects
    unpickler = _Unpickler(io.BytesIO(b"\x80\x02}(" + nested + b"I1\nU\x01aI2\nu."), encoding="utf-8")
    assert unpickler.load() == {"a": 2}


def test_torchs_own_reader_where_the_environment_insists(tmp_path, raw, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")
    torch.save({"model": raw}, tmp_path / "x.pth")
    assert same(make(tmp_path / "x.pth"), raw)
    torch.save({"model": raw, "args": Reduces(os.system, ("true",))}, tmp_path / "x.pth")
    with pytest.raises(InputError, match="would run code"):
        make(tmp_path / "x.pth")


def test_files_of_something_else_are_one_sentence(tmp_path, raw):
    path = tmp_path / "x.pth"
    torch.save(timm.create_model("test_resnet").state_dict(), path)
    for args in ({}, {"num_classes": 3}):  # another head excuses nothing else
        said = (rf"x.pth does not hold the weights of {NAME}: \d of its {len(raw)} names fit; \d+ do not, such as stem.conv1.weight "
                r"\(missing\), .*; it seems to be another network, of 0.47 M numbers, whose names begin with conv1.0.weight, conv1.1")
        with pytest.raises(InputError, match=said):
            timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=dict(file=str(path)), **args)
    torch.save(timm.create_model("attnet_xxs").state_dict(), path)
    with pytest.raises(InputError, match=r"they are those of attnet_xxs$"):
        make(path)
    for content, said in (([1], "holds a list, not weights by name"), ({}, "holds no weights by name, but nothing"),
                          ({"model": nn.Linear(1, 1)}, "holds no weights by name, but model; a model saved whole")):
        torch.save(content, path)
        with pytest.raises(InputError, match=said):
            make(path)


def test_a_model_is_as_it_was_after_a_file_that_does_not_fit(tmp_path, raw):
    model = timm.create_model(NAME)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.save({**raw, "stem.conv1.weight": raw["stem.conv1.weight"][:1]}, tmp_path / "x.pth")
    with pytest.raises(InputError, match=r"1 do not, such as stem.conv1.weight \(1, .*; it seems to be a changed version of it"):
        load_weights(model, tmp_path / "x.pth")
    assert same(model, before)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_trained_head_and_stem_are_kept(tmp_path, suffix):
    """Whatever the registered config says of classes and channels."""
    args = dict(num_classes=7, in_chans=1)
    weights = timm.create_model(NAME, **args).state_dict()
    path = tmp_path / f"x{suffix}"
    safetensors.torch.save_file(weights, path) if suffix == ".safetensors" else torch.save({"state_dict": weights}, path)
    overlay = dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(path)))
    assert same(timm.create_model(NAME, **overlay, **args), weights)
    other = timm.create_model(NAME, **overlay, num_classes=3, in_chans=3).state_dict()
    assert other["head.fc.weight"].shape[0] == 3
    assert torch.allclose(other["stem.conv1.weight"].sum(1, keepdim=True), weights["stem.conv1.weight"])
    features = timm.create_model(NAME, features_only=True, **overlay, in_chans=1).state_dict()
    names = {name: name.replace("stages_", "stages.").replace("stem_", "stem.") for name in features}
    assert all(torch.equal(value, weights[names[name]]) for name, value in features.items())
    headless = timm.create_model(NAME, **overlay, num_classes=0, in_chans=1).state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in headless.items())


def test_a_missing_head_is_said_unless_another_is_wanted(tmp_path, raw):
    torch.save({name: value for name, value in raw.items() if not name.startswith("head.fc")}, tmp_path / "x.pth")
    with pytest.raises(InputError, match=r"head.fc.weight \(missing\), head.fc.bias \(missing\)"):
        make(tmp_path / "x.pth")
    overlay = dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / "x.pth")))
    for classes in (0, 5):
        state = timm.create_model(NAME, num_classes=classes, **overlay).state_dict()
        assert all(torch.equal(value, raw[name]) for name, value in state.items() if not name.startswith("head.fc"))


def test_weights_can_be_given_as_they_were_read(tmp_path, raw):
    model = timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=dict(state_dict={"module.model": 1, "model": raw}))
    assert same(model, raw)
    assert zoo.weights_in({"model": raw}).keys() == raw.keys()

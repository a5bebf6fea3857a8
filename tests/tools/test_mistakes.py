"""Mistakes that people make: each ends in one sentence that says what is wrong and what to do, exit status 2, and leaves nothing behind."""
import re
import sys
import zipfile
from pathlib import Path

import onnx
import pytest
import timm
import torch
from PIL import Image

import zoo
import zoo.mm  # noqa: F401  so that the first test is not the slow one
from zoo.checkpoints import load_model, load_trained
from zoo.errors import InputError
from zoo.predicting.classification import predict
from zoo.tools._cli import command

DIGITS = "biformer_nano_digits"
IN1K = "train biformer_tiny_in1k --cfg-options model.name=biformer_nano"


def _save_unet(name: str, input_size: tuple[int, ...], path: Path) -> None:
    args = {"widths": (4, 6), "num_classes": 2}
    state = {f"model.{key}": value for key, value in timm.create_model(name, **args).state_dict().items()}
    record = {"task": "segmentation", "model": name, "model_args": args, "classes": ["a", "b"], "input_size": input_size}
    torch.save({"zoo": record, "state_dict": state}, path)


@pytest.fixture(scope="module")
def things(checkpoint, tmp_path_factory) -> Path:
    """A folder with what is given in the place of something else."""
    folder = tmp_path_factory.mktemp("things")
    (folder / "x.pth").write_bytes(checkpoint.read_bytes())
    torch.save({"state_dict": {"fc.weight": torch.rand(3)}}, folder / "other.pth")
    _save_unet("attention_unet", (3, 16, 16), folder / "unet.pth")
    Image.new("RGB", (40, 30), "red").save(folder / "a.png")
    (folder / "half.png").write_bytes((folder / "a.png").read_bytes()[:60])
    for name in ("text.png", "notes.txt", "text.onnx"):
        (folder / name).write_text("hello")
    (folder / "empty.pth").touch()
    (folder / "empty").mkdir()
    with zipfile.ZipFile(folder / "scans.zip", "w") as archive:
        archive.write(folder / "a.png", "a.png")
    for split in ("train", "val"):
        (folder / "in1k" / split / "cat").mkdir(parents=True)
        Image.new("RGB", (40, 30), "red").save(folder / "in1k" / split / "cat" / "a.png")
    ends = [onnx.helper.make_tensor_value_info(name, 1, [1]) for name in "xy"]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "g", ends[:1], ends[1:])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9), folder / "foreign.onnx")
    return folder


MISTAKES = [
    ("predikt x.pth a.png", "there is no program 'predikt'; did you mean predict"),
    # predict
    ("predict x.pth b.png", "there is no picture b.png; did you mean a.png"),
    ("predict x.pth text.png", "text.png is not a picture that can be read"),
    ("predict x.pth half.png", "half.png (is not a picture that can be|cannot be) read"),
    ("predict x.pth scans.zip", "scans.zip is an archive; unpack it, and give the folder"),
    ("predict x.pth empty", r"the folder empty holds no picture \(\.bmp"),
    ("predict x.pth a.png -o answers.xlsx", r"a file to write here \(\.csv \.json .*; the name of a new folder has no suffix"),
    ("predict x.pth a.png -o no/answers.csv", "cannot write no/answers.csv: there is no folder no"),
    ("predict x.pth a.png -o notes.txt/answers.csv", "cannot write notes.txt/answers.csv: there is no folder notes.txt"),
    ("predict x.pth a.png -o a.png", "a.png is one of the files given and would be overwritten; choose another output"),
    ("predict a.png x.pth", "a.png is damaged or no checkpoint at all .*; give a file that `zoo train` wrote"),
    ("predict resnet18 a.png", "there is no checkpoint resnet18; that is a model's name, whose weights would be random: give a file"),
    ("predict other.pth a.png", "other.pth is not a checkpoint of `zoo train`: it holds"),
    ("predict empty.pth a.png", "empty.pth is empty, not a checkpoint"),
    ("predict empty a.png", "empty is a folder; name a checkpoint file"),
    ("predict x.pth a.png --top 0", "0 classes .* have to be at least 1"),
    ("predict x.pth a.png --batch -1", "batches of -1 .* have to be at least 1"),
    ("predict x.pth a.png --threshold 0.5", "--threshold is for detectors, and test_resnet is none of them"),
    ("predict x.pth a.png --window 64 64", "--window is for networks that look at pictures or volumes in windows, and test_resnet"),
    ("predict unet.pth a.png", "its masks have to go somewhere: name a file or folder with -o"),
    ("predict unet.pth a.png -o map.jpg", r"map.jpg is neither a folder nor .* here \(.csv .json .png\)"),
    ("predict unet.pth a.png -o map.png --window -8 8", "the window is -8×8, where attention_unet needs 2 sizes of at least 1"),
    ("predict unet.pth a.png -o map.png --top 3", "--top is for networks that name classes"),
    ("predict unet.pth a.png half.png -o map.png", "2 answers are too many for one file .*; give a folder instead of map.png"),
    ("predict foreign.onnx a.png", "foreign.onnx is no ONNX file of `zoo export`.*; export the checkpoint again"),
    ("predict text.onnx a.png", "text.onnx, which is damaged or no ONNX file"),
    ("predict nowhere.onnx a.png", "there is no ONNX file nowhere.onnx"),
    # export
    ("export x.pth -o x.pt", "x.pt is no name of an ONNX file; it has to end in .onnx"),
    ("export x.pth -o empty", "cannot write empty: it is a folder"),
    ("export x.pth -o x.onnx --size 64", "the size 64 has 1 numbers, where height and width are needed"),
    ("export x.pth -o x.onnx --size -1 64", "the size -1x64 is not positive"),
    ("export x.pth -o x.onnx --opset 3", "opset 3 is not available; 18 to"),
    ("export foreign.onnx -o y.onnx", "foreign.onnx is an ONNX file, which `zoo predict` takes; here a checkpoint is needed"),
    ("export x.pth -o y.onnx --precision int8", "int8 has to be calibrated: give a folder of pictures"),
    ("export x.pth -o y.onnx --precision int8 --pictures empty", "the folder empty holds no picture"),
    # visualize
    ("visualize tst_resnet a.png -o seen", "'tst_resnet'; did you mean test_resnet"),
    ("visualize x.pth a.png -o seen.html", "seen.html is neither a folder .*; the name of a new folder has no suffix"),
    ("visualize x.pth a.png -o seen --target 7", "the target is a class number from 0 to 2, got 7"),
    ("visualize x.pth a.png -o seen --attributions gradcm", "no attribution 'gradcm'; did you mean gradcam"),
    ("visualize x.pth notes.txt -o seen", "notes.txt is not a picture that can be read"),
    # benchmark, models, fetch, prepare-digits
    ("benchmark test_resnt", "'test_resnt'; did you mean test_resnet"),
    ("benchmark test_resnet --size -3 4", "size is -3; it has to be at least 1"),
    ("benchmark test_resnet --batch 0", "batch is 0; it has to be at least 1"),
    ("benchmark test_resnet --json empty", "cannot write empty: it is a folder"),
    ("models biformer_tny", "no model matches 'biformer_tny'; did you mean biformer_tiny"),
    ("models --mechanism rooting", "there is no mechanism 'rooting'; .*; did you mean routing"),
    ("fetch litv2_z", "there is no model 'litv2_z'; did you mean litv2_s"),
    ("fetch resnet18", "no weights of resnet18 were released that the zoo knows of; of these there are"),
    ("fetch litv2_s --cache notes.txt", "nothing can be kept in notes.txt: it is a file; choose a folder"),
    ("prepare-digits notes.txt", "cannot write to the folder notes.txt/images/train: notes.txt is a file"),
    # test
    (f"test {DIGITS} nowhere.pth", "there is no checkpoint nowhere.pth"),
    (f"test {DIGITS} x.pth", "the data and the checkpoint x.pth do not have the same classes, 10 and 3"),
    (f"test {DIGITS} other.pth", "the weights in other.pth are of another model: "),
    (f"test {DIGITS} notes.txt", "notes.txt is damaged or no checkpoint at all"),
    (f"test {DIGITS} foreign.onnx", "foreign.onnx is an ONNX file, which `zoo predict` takes"),
    (f"test x.pth {DIGITS}", "x.pth is no config, which is a .py file or the name of an installed one; the config comes first"),
    (f"test {DIGITS} x.pth --csv classes.csv", "--csv is for the numbers of --per-class"),
    # train
    ("train notes.txt", "notes.txt is no config, which is a .py file"),
    (f"train {DIGITS[:-1]}", f"there is no config .*; did you mean {DIGITS}"),
    (f"train {DIGITS} --cfg-options train_cfg.max_epoch=3", "unknown key 'max_epoch'; did you mean max_epochs"),
    (f"train {DIGITS} --cfg-options train_cfg.max_epochs=-1", "train_cfg.max_epochs is -1; it has to be at least 1"),
    (f"train {DIGITS} --cfg-options train_dataloader.batch_size=0", "batch_size should be a positive integer"),
    (f"train {DIGITS} --cfg-options optim_wrapper.optimizer.lr=-1", "Invalid learning rate: -1"),
    (f"train {DIGITS} --cfg-options model.args.num_classes=7", "the model has 7 classes, the train data 10; set model.args.num_classes"),
    (f"train {DIGITS} --resume x.pth", "the data and the checkpoint x.pth do not have the same classes"),
    (f"train {DIGITS} --resume other.pth", "the weights in other.pth are of another model"),
    (f"train {DIGITS} --work-dir notes.txt", "nothing can be written to the work dir notes.txt: .* is a file"),
    (f"{IN1K} data_root=nowhere", "there is no data folder nowhere; set data_root to the folder that holds train/ and val/"),
    (f"{IN1K} data_root=empty", "the data folder empty has no train/"),
    (f"{IN1K} data_root=in1k", "the model has 1000 classes, the train data 1; set model.args.num_classes"),
]


@pytest.mark.parametrize(("line", "message"), MISTAKES, ids=[line for line, _ in MISTAKES])
def test_a_mistake_ends_in_a_sentence(line, message, things, monkeypatch, capfd):
    monkeypatch.chdir(things)
    before = {path: path.stat().st_mtime_ns for path in things.rglob("*")}
    with pytest.raises(SystemExit) as end:
        command(line.split())
    said = capfd.readouterr()
    *progress, last = said.err.strip().splitlines()
    assert end.value.code == 2 and last.startswith("error: ") and re.search(message, last), said.err
    assert not any("Traceback" in line or line.startswith("error") for line in progress) and said.out == ""
    assert {path: path.stat().st_mtime_ns for path in things.rglob("*")} == before


@pytest.mark.parametrize(("package", "line", "extra"), [
    ("onnxruntime", "predict foreign.onnx a.png", "export"), ("onnxscript", "export x.pth -o x.onnx", "export"),
    ("captum", "visualize x.pth a.png -o seen", "visualize"), ("nibabel", "predict volume.pth v.nii.gz -o m.nii.gz", "volumes"),
])
def test_a_missing_package_is_named_with_the_command_that_installs_it(package, line, extra, things, tmp_path, monkeypatch, capfd):
    for path in things.iterdir():
        (tmp_path / path.name).symlink_to(path)
    _save_unet("attention_unet3d", (1, 8, 8, 8), tmp_path / "volume.pth")
    (tmp_path / "v.nii.gz").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit) as end:
        command(line.split())
    assert end.value.code == 2
    said = capfd.readouterr().err
    assert re.search(rf"error: .* needs the package {package}; install it with: pip install 'zoo-attention\[{extra}\]'", said), said


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there(capfd):
    with pytest.raises(SystemExit):
        command(["benchmark", "test_resnet", "--device", "cuda"])
    assert "device cuda was asked for, but torch finds no GPU here; use cpu" in capfd.readouterr().err


@pytest.mark.parametrize(("call", "message"), [
    (lambda things: load_model("biformer_tny"), "did you mean biformer_tiny"),
    (lambda things: load_trained(things / "y.pth"), "there is no checkpoint .*y.pth; did you mean x.pth"),
    (lambda things: load_trained("biformer_tiny"), "that is a model's name, whose weights would be random"),
    (lambda things: predict(*load_trained(things / "x.pth"), [things / "a.png"], top=0), "at least 1"),
    (lambda things: zoo.list_models(mechanism="rooting"), "did you mean routing"),
    (lambda things: zoo.attach(timm.create_model("test_resnet"), "dsa"), "there is no layer 'dsa' to attach; .*did you mean das"),
    (lambda things: zoo.attach(timm.create_model("test_resnet"), "das", where="layer9"), "no module 'layer9'; did you mean"),
], ids=range(7))
def test_mistakes_in_python_are_value_errors_that_say_the_same(call, message, things):
    with pytest.raises(InputError, match=message) as raised:
        call(things)
    assert isinstance(raised.value, ValueError)

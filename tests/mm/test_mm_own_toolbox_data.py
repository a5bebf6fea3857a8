"""Somebody's own pictures for the toolboxes: what they may lack, and what is refused before the first step instead of being learnt."""
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mmdet", reason="needs mmdetection and mmsegmentation: make mm")
import torch
from mmengine.registry import DATASETS
from PIL import Image

from zoo.checkpoints import read
from zoo.errors import InputError
from zoo.mm import evaluate, train
from zoo.mm.checkpoint import latest_checkpoint
from zoo.mm.config import load_config, scope
from zoo.mm.data_checks import build_dataset, check_dataset
from zoo.mm.toolbox_operators import SteadyBatchNorm2d
from zoo.predicting.scenes import SceneInfo
from zoo.reading.annotations import check_size, complete
from zoo.reading.say import say_once

DETECTOR, SEGMENTOR = "mask-rcnn_biformer-nano_fpn_digits", "upernet_biformer-nano_digits"
SIZE = 64
CATS = ("cat", "dog")


def picture(path: Path, number: int, size: tuple[int, int] = (SIZE, SIZE), **arguments) -> tuple[list[int], np.ndarray]:
    """Writes a grey picture with a bright rectangle; its box and mask."""
    random = np.random.default_rng(number)
    left, top = (int(random.integers(4, side // 3)) for side in size)
    width, height = size[0] // 2, size[1] // 3
    mask = np.zeros(size[::-1], bool)
    mask[top:top + height, left:left + width] = True
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.where(mask, 220, 40).astype(np.uint8)).save(path, **arguments)
    return [left, top, width, height], mask


def coco(root: Path, split: str, pictures: int = 2, **changes) -> dict:
    """Pictures and annotations with boxes alone, which is the least; `changes` are to the whole file."""
    content = {"images": [], "annotations": [], "categories": [{"id": 3 + 2 * i, "name": name} for i, name in enumerate(CATS)]}
    for i in range(pictures):
        box, _ = picture(root / "images" / split / f"{i}.png", i)
        content["images"].append({"id": i, "file_name": f"{i}.png", "width": SIZE, "height": SIZE})
        content["annotations"].append({"image_id": i, "category_id": 3 + 2 * (i % 2), "bbox": box})
    content |= changes
    (root / "annotations").mkdir(exist_ok=True)
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return content


def boxes_only(root: Path, classes: tuple[str, ...] = CATS) -> list[str]:
    options = [f"data_root={root}", "train_cfg.max_epochs=1", "train_cfg.val_interval=1", "train_dataloader.batch_size=2",
               "model.roi_head.mask_head=None", "model.roi_head.mask_roi_extractor=None",
               f"model.roi_head.bbox_head.num_classes={len(classes)}"]
    for part in ("train", "val", "test"):
        options += [f"{part}_dataloader.dataset.metainfo={{'classes': {classes!r}}}",
                    f"{part}_dataloader.dataset.pipeline.{1 if part == 'train' else 2}.with_mask=False"]
        options += [f"{part}_evaluator.metric=['bbox']"] if part != "train" else []
    return options


@pytest.fixture
def animals(tmp_path):
    for split in ("train", "val"):
        coco(tmp_path, split)
    return tmp_path


def test_boxes_alone_are_enough_with_mixed_precision_too(animals):
    """Neither ids, areas, crowds nor segmentations; and mmcv's suppression and alignment do not know bfloat16."""
    options = [*boxes_only(animals), f"visualizer.name={animals.name}"]
    train(DETECTOR, work_dir=animals / "run", amp=True, cfg_options=options)
    checkpoint = latest_checkpoint(animals / "run")
    assert read(checkpoint)["zoo"]["classes"] == list(CATS)
    assert load_config(DETECTOR, options).default_hooks.checkpoint.save_best == "coco/bbox_mAP"
    assert evaluate(DETECTOR, checkpoint, cfg_options=options) is not None
    for split in ("train", "val"):
        coco(animals, split, categories=[{"id": 3, "name": "dog"}, {"id": 5, "name": "cat"}])
    with pytest.raises(InputError, match="the data and the checkpoint .* have the same classes in another order: number 0 is 'dog' there"):
        evaluate(DETECTOR, checkpoint, cfg_options=boxes_only(animals, ("dog", "cat")))


@pytest.mark.parametrize(("classes", "message"), [
    (("dog", "cat"), r"the classes 'dog', 'cat' are in another order than the categories of .*train.json.*write classes=\('cat', 'dog',\)"),
    (("cat", "dogs"), r"train.json has no category 'dogs', which is one of the classes; did you mean dog.*it has 'cat', 'dog'"),
    (("cat", "dog", "cow"), "has no category 'cow'"),
], ids=str)
def test_classes_are_those_of_the_annotations(animals, classes, message):
    with pytest.raises(InputError, match=message):
        train(DETECTOR, work_dir=animals / "run", cfg_options=boxes_only(animals, classes))
    assert not (animals / "run").exists()


def test_some_of_the_categories_are_numbered_by_the_config(animals):
    config = load_config(DETECTOR, boxes_only(animals, ("dog",)))
    with scope(config):
        dataset = DATASETS.build(config.val_dataloader.dataset)
    labels = [[instance["bbox_label"] for instance in dataset.get_data_info(i)["instances"]] for i in range(2)]
    assert labels == [[], [0]]


def test_what_annotations_lack_is_filled_in_or_named(tmp_path):
    square = {"image_id": 0, "category_id": 1, "segmentation": [[2, 3, 12, 3, 12, 8, 2, 8]]}
    runs = {"image_id": 0, "category_id": 1, "segmentation": {"size": [20, 30], "counts": [25, 10, 565]}, "iscrowd": 1}
    base = {"images": [{"id": 0, "file_name": "x", "width": 30, "height": 20}], "categories": [{"id": 1, "name": "a"}]}
    content = {**base, "annotations": [square, runs, {"image_id": 0, "category_id": 1, "bbox": [1, 2, 3, 4], "segmentation": []}]}
    complete(content, "x.json")
    first, second, third = content["annotations"]
    assert first["bbox"] == [2, 3, 10, 5] and first["area"] == 50 and first["iscrowd"] == 0 and first["id"] == 1
    assert second["bbox"] == [1, 5, 1, 10] and second["area"] == 10 and second["iscrowd"] == 1
    assert third["area"] == 12 and "segmentation" not in third
    box = {"image_id": 0, "category_id": 1, "bbox": [0, 0, 5, 5]}
    for changes, message in [
        ({"annotations": [{**box, "category_id": 2}]}, "annotation 1 in x.json is of category 2, which is not in the file"),
        ({"annotations": [{**box, "image_id": 2}]}, "annotation 1 in x.json is of image 2"),
        ({"annotations": [{"image_id": 0, "category_id": 1}]}, "annotation 1 in x.json has neither a bbox nor a segmentation"),
        ({"annotations": [{**box, "id": 4}, {**box, "id": 4}]}, "2 of the annotations in x.json have the id 4"),
        ({"categories": 2 * [{"id": 1, "name": "a"}], "annotations": []}, "2 of the categories in x.json have the id 1"),
        ({"categories": [{"id": i, "name": "a"} for i in (1, 2)], "annotations": []}, "2 of the categories in x.json have the name 'a'"),
        ({"images": [{"id": 0, "file_name": "x", "width": 30}], "annotations": []}, "number 0 of the images in x.json has no height"),
        ({"annotations": [{**box, "bbox": [0.1, 0.1, 0.5, 0.5]}]}, "of the 1 boxes in x.json 1 are of one pixel at most: COCO's have"),
        ({"annotations": [dict(box), *({**box, "bbox": [20, 10, 29, 19]} for _ in (1, 2))]}, "of the 3 boxes in x.json 2 reach"),
        ({"annotations": None}, "x.json is no annotation file of COCO's kind: it holds images, categories, annotations"),
    ]:
        with pytest.raises(InputError, match=message):
            complete({**base, **changes}, "x.json")
    with pytest.raises(InputError, match="it holds list, where lists of"):
        complete([], "x.json")


def test_data_that_cannot_be_learnt_or_measured_are_refused(animals):
    options = boxes_only(animals)
    with pytest.raises(InputError, match=r"0.png in .*train.json has no segmentation, which a network that finds masks is trained on"):
        train(DETECTOR, work_dir=animals / "run", cfg_options=[option for option in options if "mask" not in option])
    with pytest.raises(InputError, match="val_evaluator.ann_file is .*train.json, and the val data are those of .*val.json"):
        train(DETECTOR, work_dir=animals / "run", cfg_options=[
            *options, f"val_evaluator.ann_file={animals}/annotations/instances_train.json"])
    for pictures, message in ((0, "the val data are empty: .*val.* val_dataloader=None val_cfg=None val_evaluator=None leaves"),
                              (2, "nothing can be measured on the val data: .*instances_val.json has no annotation of a class")):
        coco(animals, "val", pictures, annotations=[])
        with pytest.raises(InputError, match=message):
            train(DETECTOR, work_dir=animals / "run", cfg_options=options)
    (animals / "images/train/1.png").unlink()
    with pytest.raises(InputError, match="1 of the 2 pictures of .*train.json are missing, such as .*train/1.png"):
        train(DETECTOR, work_dir=animals / "run", cfg_options=options)
    (animals / "annotations/instances_train.json").write_text("{")
    with pytest.raises(InputError, match="the annotation file .*train.json cannot be read"):
        train(DETECTOR, work_dir=animals / "run", cfg_options=options)
    (animals / "annotations/instances_train.json").unlink()
    with pytest.raises(InputError, match="there is no annotation file .*train.json; did you mean instances_val.json"):
        train(DETECTOR, work_dir=animals / "run", cfg_options=options)


def test_boxes_are_of_the_picture_as_it_is_seen(tmp_path, caplog):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(tmp_path / "x.jpg", 0, (60, 40), exif=exif)
    check_size(tmp_path / "x.jpg", 40, 60)
    with pytest.raises(InputError, match=r"x.jpg is of 40×60 pixels, width by height, and its annotations are of 60×40: it is turned by "
                                         "its EXIF orientation 6, and they are of the picture before that"):
        check_size(tmp_path / "x.jpg", 60, 40)
    with pytest.raises(InputError, match=r"of 40×60 pixels, width by height, and its annotations are of 41×60$"):
        check_size(tmp_path / "x.jpg", 41, 60)
    exif[0x0112] = 3
    picture(tmp_path / "y.jpg", 0, (60, 40), exif=exif)
    say_once.cache_clear()
    check_size(tmp_path / "y.jpg", 60, 40)
    assert "boxes are taken to be of the pictures as they are seen" in caplog.text


def test_pictures_are_read_as_in_predicting(tmp_path):
    """Turned upright, and of 16 bits."""
    from zoo.mm.downstream import prepare
    from zoo.reading.pictures import open_picture
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(tmp_path / "images/val/0.jpg", 0, (60, 40), exif=exif)
    content = coco(tmp_path, "val", 1)
    content["images"] = [{"id": 0, "file_name": "0.jpg", "width": 40, "height": 60}]
    content["annotations"][0]["bbox"] = [5, 5, 20, 30]
    (tmp_path / "annotations/instances_val.json").write_text(json.dumps(content))
    config = load_config(DETECTOR, boxes_only(tmp_path))
    with scope(config):
        dataset = DATASETS.build(config.val_dataloader.dataset)
    steps = [dict(config.val_dataloader.dataset.pipeline[1])]
    expected = prepare(SceneInfo("mmdet", CATS, np.zeros((2, 3)), steps), open_picture(tmp_path / "images/val/0.jpg"))
    assert torch.equal(dataset[0]["inputs"], expected["inputs"][0]) and dataset[0]["inputs"].shape[1] > dataset[0]["inputs"].shape[2]


def test_a_backbone_of_other_channels_is_named_with_both(animals):
    with pytest.raises(InputError, match=r"the backbone litv2_nano gives maps of .* channels, and the neck takes \[32, 64, 128, 192\]; "
                                         r"set model.neck.in_channels=\["):
        train(DETECTOR, work_dir=animals / "run", cfg_options=[*boxes_only(animals), "model.backbone.name=litv2_nano"])


def masks(root: Path, values: tuple[int, int] = (0, 255), dtype: type = np.uint8) -> None:
    """Pictures and masks as mmsegmentation's BaseSegDataset wants them."""
    for split in ("train", "val"):
        for i in range(2):
            _, mask = picture(root / "images" / split / f"{i}.png", i)
            (root / "annotations" / split).mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.where(mask, values[1], values[0]).astype(dtype)).save(root / "annotations" / split / f"{i}.png")


def two_classes(root: Path, classes: tuple[str, ...] = ("ground", "thing")) -> list[str]:
    options = [f"data_root={root}", "train_cfg.max_iters=1", "train_cfg.val_interval=1", "default_hooks.checkpoint.interval=1",
               f"model.decode_head.num_classes={len(classes)}", f"model.auxiliary_head.num_classes={len(classes)}",
               "train_dataloader.batch_size=1", f"visualizer.name={root.name}"]
    return options + [f"{part}_dataloader.dataset.metainfo={{'classes': {classes!r}}}" for part in ("train", "val", "test")]


def test_binary_masks_are_learnt_in_batches_of_one(tmp_path, caplog):
    masks(tmp_path)
    say_once.cache_clear()
    _, metrics = train(SEGMENTOR, work_dir=tmp_path / "run", cfg_options=two_classes(tmp_path))
    assert "have values 0 and 255: 255 is taken for class 1" in caplog.text
    assert metrics["mIoU"] < 100
    again = evaluate(SEGMENTOR, latest_checkpoint(tmp_path / "run"), cfg_options=two_classes(tmp_path))
    assert again == pytest.approx(metrics, nan_ok=True)


def test_the_last_batch_of_an_epoch_may_be_one_picture(tmp_path):
    masks(tmp_path)
    for folder in ("images", "annotations"):
        shutil.copy(tmp_path / folder / "train" / "0.png", tmp_path / folder / "train" / "2.png")
    train(SEGMENTOR, work_dir=tmp_path / "run", cfg_options=[
        *two_classes(tmp_path), "train_dataloader.batch_size=2", "train_dataloader.sampler.type=DefaultSampler",
        "train_cfg.max_iters=2", "train_cfg.val_interval=2"])


def settled(root: Path, *options: str):
    """The training data, as they are after they have been checked."""
    config = load_config(SEGMENTOR, [*two_classes(root), *options])
    with scope(config):
        described = config.train_dataloader.dataset
        check_dataset("train", described, build_dataset("train", described), [])
        return DATASETS.build(described)


@pytest.mark.parametrize(("values", "dtype", "options"), [
    ((0, 1), np.uint8, []), ((0, 255), np.uint8, []), ((7, 3), np.uint8, ["train_dataloader.dataset.pipeline.1.mask_values=[7, 3]"]),
    ((0, 1000), np.uint16, ["train_dataloader.dataset.pipeline.1.mask_values=[0, 1000]"]),
    ((1, 2), np.uint8, ["train_dataloader.dataset.reduce_zero_label=True"]),
], ids=str)
def test_masks_say_what_they_mean(tmp_path, values, dtype, options):
    masks(tmp_path, values, dtype)
    labels = settled(tmp_path, *options)[0]["data_samples"].gt_sem_seg.data[0]
    _, mask = picture(tmp_path / "x.png", 0)
    assert np.array_equal(labels, mask)


def test_masks_that_do_not_fit_are_refused(tmp_path):
    masks(tmp_path, (0, 300), np.uint16)
    with pytest.raises(InputError, match=r"the mask .*train/0.png has unknown values 300; known are 0, 1, 255; mask_values="):
        settled(tmp_path)[0]
    masks(tmp_path, (0, 1))
    Image.new("L", (SIZE, SIZE)).save(tmp_path / "annotations/train/spare.png")
    with pytest.raises(InputError, match="1 masks of the train data have no picture, such as .*spare.png"):
        settled(tmp_path)
    (tmp_path / "annotations/train/spare.png").unlink()
    (tmp_path / "annotations/train/1.png").unlink()
    with pytest.raises(InputError, match=r"1 of the 2 pictures of the train data have no mask, such as .*1.png.*seg_map_suffix say"):
        settled(tmp_path)
    with pytest.raises(InputError, match="the train data are empty: .*images/train"):
        settled(tmp_path, "train_dataloader.dataset.img_suffix=.jpg")
    with pytest.raises(InputError, match=r"the classes of the train data are 'thing', one text; a list of one name has a comma"):
        settled(tmp_path, "train_dataloader.dataset.metainfo={'classes': ('thing')}")


def test_255_stays_no_class_where_masks_have_the_classes_too(tmp_path):
    masks(tmp_path, (0, 1))
    path = tmp_path / "annotations/train/0.png"
    labels = np.asarray(Image.open(path)).copy()
    labels[:5] = 255
    Image.fromarray(labels).save(path)
    assert np.array_equal(settled(tmp_path)[0]["data_samples"].gt_sem_seg.data[0], labels)


def test_the_steady_norm_is_batch_norm_but_for_one_value():
    steady, plain = SteadyBatchNorm2d(4), torch.nn.BatchNorm2d(4)
    x = torch.randn(2, 4, 3, 3)
    assert torch.equal(steady(x), plain(x)) and torch.equal(steady.running_var, plain.running_var)
    one = torch.randn(1, 4, 1, 1)
    assert torch.equal(steady(one), plain.eval()(one)) and torch.equal(steady.running_var, plain.running_var)

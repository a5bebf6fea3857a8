"""The page that a training leaves in its work dir: report.html."""
import heapq
import math
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, Self, cast

import numpy as np
import torch
from mmengine.config import Config, ConfigDict
from mmengine.device import get_device
from mmengine.evaluator import Evaluator
from mmengine.registry import MODELS
from mmengine.runner import Runner
from PIL import Image
from tqdm import tqdm

import zoo
from zoo import checkpoints
from zoo.errors import InputError, first_few, near_misses
from zoo.files import check_writable, replacing
from zoo.measuring import fixations, per_class
from zoo.measuring.per_class import Boxes, Row
from zoo.measuring.restoration import measured
from zoo.mm.checkpoint import best_checkpoint, check_fits, latest_checkpoint, load_from_local, safe_files
from zoo.mm.config import change_texts, load_config, scope
from zoo.mm.data_checks import build_dataset
from zoo.mm.downstream import SOURCES
from zoo.mm.networks import plain
from zoo.mm.per_class import class_table
from zoo.mm.runner import unlogged
from zoo.mm.training import in_one_sentence
from zoo.predicting.fixations import heat
from zoo.predicting.label_maps import background_and
from zoo.predicting.scenes import COLOURS
from zoo.reading.pictures import open_picture
from zoo.reading.scalars import STAMP, Scalars, read_scalars
from zoo.reading.shrinking import enlarge
from zoo.seeing import mistakes
from zoo.seeing.curves import PERCENT, training_charts
from zoo.seeing.figures import grey
from zoo.seeing.mistakes import CONFUSED, DIFFERENCES
from zoo.seeing.report import Mistake, Mistakes, Report, render

NAME = "report.html"
WORST = {"classes": 24, "masks": 8, "boxes": 12, "pictures": 6, "maps": 8}  # mistakes that are pictured
NUMBERS = 4  # metrics in the page's head
THRESHOLD = 0.3  # score of boxes that are drawn
LEGEND = 30  # classes in the legend of masks
NAMED = 5  # of more, some are named and the others counted


@safe_files()
def write_report(work_dir: str | Path, checkpoint: str | Path | None = None) -> Path:
    """Evaluates a checkpoint on the validation data of the training in `work_dir` and writes report.html there; its path.

    Args:
        work_dir: where `zoo train` wrote.
        checkpoint: default: the best that it kept, or else the newest.

    Raises InputError for a folder that no training wrote, a checkpoint that does not fit, and data that are not there any more.
    """
    paths = _Paths.of(Path(work_dir), checkpoint)
    target = paths.work_dir / NAME
    check_writable(target)
    config = load_config(paths.config)
    change_texts(config, lambda text: "BN" if text == "SyncBN" else text)
    with scope(config), unlogged():
        trained_on = build_dataset("train", config.train_dataloader.dataset)
        if hasattr(trained_on, "full_init"):
            trained_on.full_init()
        model = _model(config, paths.checkpoint, trained_on.metainfo["classes"])
        evaluated = in_one_sentence(lambda: _evaluate(config, model)) if config.get("val_dataloader") else {}
        report = _report(config, paths, read_scalars(paths.work_dir), model, trained_on, evaluated)
    with replacing(target) as written:
        written.write_text(render(report), encoding="utf-8", errors="replace")  # names of files can be bytes that are no text
    return target


class _Paths(NamedTuple):
    """What is in a work dir: the config of the last training, the newest checkpoint, and the one to report on."""

    work_dir: Path
    config: Path
    newest: Path
    checkpoint: Path

    @classmethod
    def of(cls, work_dir: Path, checkpoint: str | Path | None) -> Self:
        if not work_dir.is_dir():
            others = [path.name for path in work_dir.parent.iterdir()] if work_dir.parent.is_dir() else []
            raise InputError(f"there is no work dir {work_dir}{near_misses(work_dir.name, others)}")
        configs = sorted(work_dir.glob("*.py"), key=lambda path: path.stat().st_mtime)  # each run writes its own
        if not configs:
            raise InputError(f"{work_dir} holds no config: it is no work dir of `zoo train`")
        newest, best = latest_checkpoint(work_dir), best_checkpoint(work_dir)
        if newest is None or best is None:
            raise InputError(f"{work_dir} holds no checkpoint yet: there is nothing to report")
        return cls(work_dir, configs[-1], newest, Path(checkpoint) if checkpoint else best)


def _model(config: Config, checkpoint: Path, classes: Sequence[str]) -> Any:
    """The model with the weights of the checkpoint, which knows these classes; those that training began with are not read."""
    described = ConfigDict(checkpoints.without(plain(config.model), SOURCES))
    if preprocessor := config.get("data_preprocessor"):
        described.setdefault("data_preprocessor", preprocessor)
    model = MODELS.build(described)
    model.load_state_dict(check_fits(checkpoint, model, whole=True, classes=classes), strict=False)
    return model.to(get_device()).eval()


def _evaluate(config: Config, model: Any) -> dict:
    """The metrics of the config, and what `Report` says of classes and mistakes, from one pass over the validation data."""
    loader: Any = Runner.build_dataloader(config.val_dataloader, seed=0)
    dataset = loader.dataset
    metrics = config.val_evaluator if isinstance(config.val_evaluator, list) else [config.val_evaluator]
    kind = {"mmdet": _Detections, "mmseg": _Scenes}.get(config.get("default_scope", ""))
    answers = (kind or OF_TASKS.get(model.task, _Masks))(dataset)
    config.test_evaluator = config.val_evaluator  # what the next reads
    table: list[Any] = []
    try:
        table += [class_table(config)] if answers.of_classes else []
    except InputError as error:
        answers.notes.append(f"There is no table of classes: {error}.")
    evaluator = Evaluator([*metrics, *table])
    evaluator.dataset_meta = dataset.metainfo
    with torch.no_grad():
        for batch in tqdm(loader, desc="report", leave=False, disable=None):  # None: off a terminal
            samples = model.val_step(batch)
            evaluator.process(data_samples=samples, data_batch=batch)
            answers.add(batch, samples)
    if not answers.count:
        raise InputError("the validation data hold no sample")
    measured = evaluator.evaluate(answers.count)
    rows = table[0].rows if table else []
    said = answers.said(rows)
    return {"metrics": measured, "samples": answers.count, "notes": answers.notes, "classes": answers.names, "table": rows, **said}


class _Answers:
    """Base of what is gathered from batches and answers.

    Subclasses give `add`, which counts samples in `count`, and `said`, arguments of `Report`, by the rows of its table. `notes` are
    sentences for it.
    """

    most: int
    of_classes = True

    def __init__(self, dataset: Any):
        self.names = [str(name) for name in dataset.metainfo["classes"]]
        self.dataset, self.count, self.notes = dataset, 0, []
        self._heap: list[tuple[float, int, Mistake]] = []

    def add(self, batch: dict, samples: Sequence[Any]) -> None:
        raise NotImplementedError

    def said(self, rows: Sequence[Row]) -> dict:
        raise NotImplementedError

    def offer(self, badness: float, picture: Callable[[], Mistake]) -> None:
        """Keeps the picture of the sample whose turn it is, if it is among the worst."""
        entry = (badness, -self.count)
        if badness > 0 and (len(self._heap) < self.most or entry > self._heap[0][:2]):
            (heapq.heappush if len(self._heap) < self.most else heapq.heapreplace)(self._heap, (*entry, picture()))

    def worst(self, sentence: str, none: str, legend: Mapping[str, mistakes.Colour] | None = None) -> Mistakes:
        shown = [mistake for *_, mistake in sorted(self._heap, key=lambda entry: entry[:2], reverse=True)]
        return Mistakes(sentence if shown else none, shown, legend or {} if shown else {})

    def name(self) -> str:
        """Of the sample whose turn it is: its file's, if the dataset knows one."""
        if files := getattr(self.dataset, "samples", None):
            return Path(files[self.count][0]).name
        if names := getattr(self.dataset, "names", None):
            return Path(names[self.count % len(names)]).name
        return f"sample {self.count}"

    def missing(self, counts: np.ndarray) -> None:
        """Says which classes the data do not hold."""
        if absent := [name for name, count in zip(self.names, counts, strict=True) if not count]:
            self.notes.append(f"The validation data hold nothing of {first_few(absent, NAMED)}: there are no numbers for that.")


class _Classes(_Answers):
    most = WORST["classes"]

    def __init__(self, dataset: Any):
        super().__init__(dataset)
        self.targets, self.answers = [], []

    def add(self, batch: dict, samples: Sequence[Any]) -> None:
        scored = self.dataset.metainfo.get("scored")
        for inputs, sample in zip(batch["inputs"], samples, strict=True):
            scores, target = sample["scores"].float().cpu().numpy(), int(sample["target"])
            if not np.isfinite(scores).all():
                raise InputError(f"the scores of {self.name()} are not finite numbers: the weights have diverged, or the data are not")
            if scored:  # as the metric has it
                scores = np.where(np.isin(np.arange(len(scores)), scored), scores, -np.inf)
            answer = int(scores.argmax())
            self.targets.append(target)
            self.answers.append(answer)
            if answer != target:
                self.offer(float(scores[answer]), lambda inputs=inputs, scores=scores, target=target, answer=answer: Mistake(
                    f"{self.names[answer]}, not {self.names[target]}",
                    f"{self.name()}: answered {self.names[answer]} with {scores[answer]:.1%}; given is {self.names[target]}, with "
                    f"{scores[target]:.1%}", [("what the model saw", mistakes.fitted(_picture(inputs, self.dataset.data_config)))]))
            self.count += 1

    def said(self, rows: Sequence[Row]) -> dict:
        targets, answers = np.array(self.targets), np.array(self.answers)
        counts = per_class.confusion(targets, answers, len(self.names))
        self.missing(counts.sum(1))
        return {"by": "f1", "confusion": counts,
                "mistakes": self.worst("Wrong answers with the highest scores, the answer first.", "No answer is wrong.")}


class _Areas(_Answers):
    """Base of answers that are label maps."""

    most = WORST["masks"]
    background = True

    def __init__(self, dataset: Any, colours: np.ndarray):
        super().__init__(dataset)
        self.colours = colours
        self.confusion = np.zeros((len(self.names), len(self.names)), np.int64)

    def compare(self, target: np.ndarray, answer: np.ndarray, picture: Callable[[], tuple[str, list[mistakes.Picture]]]) -> None:
        """Counts a map and offers its picture."""
        counts = per_class.confusion(target, answer, len(self.names))
        self.confusion += counts
        hits, sizes = counts.diagonal(), counts.sum(0) + counts.sum(1)
        there = [i for i in np.flatnonzero(sizes).tolist() if i >= int(self.background)]
        dice = {i: 2 * hits[i] / sizes[i] for i in there}
        mean = sum(dice.values()) / max(1, len(dice))

        def mistake() -> Mistake:
            what, pictures = picture()
            lowest = sorted(dice, key=lambda i: dice[i])[:NAMED]
            of = "; ".join(f"{self.names[i]}: {dice[i]:.1%}" for i in lowest)
            return Mistake(f"Dice {mean:.1%}", f"{what}. {'The lowest: ' if len(dice) > NAMED else ''}{of}", pictures)

        self.offer(1 - mean if dice else 0, mistake)

    def worst_masks(self) -> Mistakes:
        shown = [i for i in np.flatnonzero(self.confusion.sum(0) + self.confusion.sum(1)).tolist() if i >= int(self.background)]
        classes = {self.names[i]: tuple(self.colours[i].tolist()) for i in shown[:LEGEND]}
        return self.worst("The lowest Dice, the mean over the classes that are given or answered.", "No mask differs from its answer.",
                          {**classes, **(DIFFERENCES if self.background else {"answered as another class": CONFUSED})})


class _Masks(_Areas):
    """Of our own segmentors, of pictures and volumes."""

    def __init__(self, dataset: Any):
        classes = len(dataset.metainfo["classes"])
        super().__init__(dataset, background_and(classes))
        self.overlaps, self.volumes = [], False

    def add(self, batch: dict, samples: Sequence[Any]) -> None:
        for inputs, sample in zip(batch["inputs"], samples, strict=True):
            target, answer = (sample[name].cpu().numpy() for name in ("target", "labels"))
            self.volumes = target.ndim == 3
            if not self.volumes:  # whose distances the table has
                self.overlaps.append(per_class.overlap(target, answer, len(self.names)))
            self.compare(target, answer, lambda inputs=inputs, target=target, answer=answer: self._pictured(inputs, target, answer))
            self.count += 1

    def _pictured(self, inputs: torch.Tensor, target: np.ndarray, answer: np.ndarray) -> tuple[str, list[mistakes.Picture]]:
        if not self.volumes:
            return self.name(), mistakes.masks(_picture(inputs, self.dataset.data_config), target, answer, self.colours)
        at = int(((target != answer) & (target < len(self.names))).sum((0, 1)).argmax())
        image, target, answer = (np.rot90(values[..., at]) for values in (inputs[0].cpu().numpy(), target, answer))  # the front up
        what = f"{self.name()}, slice {at} of {inputs.shape[-1]}, where most differs"
        return what, mistakes.masks(grey(image), target, answer, self.colours)

    def said(self, rows: Sequence[Row]) -> dict:
        self.missing(self.confusion.sum(1))
        if self.volumes:
            return {"by": "dice", "distance": "mm", "mistakes": self.worst_masks()}
        distances = [math.nan, *(row["hd95"] for row in per_class.overlaps(self.overlaps, self.names))]
        table = [{**row, "hd95": distance} for row, distance in zip(rows, distances, strict=True)]
        return {"table": table, "by": "iou", "distance": "pixels", "mistakes": self.worst_masks()}


class _Pictures(_Answers):
    """Of networks that restore pictures."""

    most = WORST["pictures"]
    of_classes = False

    def add(self, batch: dict, samples: Sequence[Any]) -> None:
        for sample in samples:
            given, restored, target = (sample[name].cpu() for name in ("given", "restored", "target"))
            scale = target.shape[1] // given.shape[1]
            bicubic = enlarge(given, scale)
            found, usual = (measured(picture, target, scale)["psnr"] for picture in (restored, bicubic))
            shown = {"bicubic": bicubic, "restored": restored, "true": target}
            self.offer(1 / max(found, 1e-3), lambda shown=shown, found=found, usual=usual: Mistake(
                f"{found:.2f} dB", f"{self.name()}: bicubic interpolation has {usual:.2f} dB; the place where the network is furthest off",
                [(name, picture) for name, picture in _furthest(shown).items()]))
            self.count += 1

    def said(self, rows: Sequence[Row]) -> dict:
        return {"by": "", "mistakes": self.worst("The pictures that come least close, the least first.", "No picture is there.")}


class _CutOuts(_Answers):
    """Of networks that cut out objects."""

    most = WORST["maps"]
    of_classes = False

    def add(self, batch: dict, samples: Sequence[Any]) -> None:
        for inputs, sample in zip(batch["inputs"], samples, strict=True):
            alpha, target = (sample[name].float().cpu().numpy() for name in ("alpha", "target"))
            error = float(abs(alpha - target).mean())
            self.offer(error, lambda inputs=inputs, alpha=alpha, target=target, error=error: Mistake(
                f"mean error {error:.1%}",
                f"{self.name()}: {target.mean():.1%} of it are the object, {(alpha > 0.5).mean():.1%} were answered",
                [("what the model saw", mistakes.fitted(_picture(inputs, self.dataset.data_config))),
                 *((what, mistakes.fitted(_shades(values))) for what, values in (("given", target), ("answer", alpha)))]))
            self.count += 1

    def said(self, rows: Sequence[Row]) -> dict:
        return {"by": "", "mistakes": self.worst("The largest mean errors of what was cut out.", "No picture differs from its mask.")}


class _Looks(_Answers):
    """Of networks that say where people look."""

    most = WORST["maps"]
    of_classes = False

    def add(self, batch: dict, samples: Sequence[Any]) -> None:
        for sample in samples:
            maps = {"given": sample["density"].cpu().float(), "answer": sample["saliency"].cpu().float()}
            found = fixations.measured(maps["answer"], maps["given"])
            self.offer(1 - found["cc"], lambda maps=maps, found=found: Mistake(
                f"correlation {found['cc']:.2f}", f"{self.name()}: similarity {found['sim']:.2f}, divergence {found['kl']:.2f}",
                self._pictured(maps)))
            self.count += 1

    def _pictured(self, maps: Mapping[str, torch.Tensor]) -> list[mistakes.Picture]:
        picture = mistakes.fitted(open_picture(self.dataset.files[self.count][0]))
        shades = {what: _shades((values / values.max().clamp(min=1e-12)).numpy()) for what, values in maps.items()}
        return [("picture", picture), *((what, heat(picture, np.asarray(shade.resize(picture.size)))) for what, shade in shades.items())]

    def said(self, rows: Sequence[Row]) -> dict:
        return {"by": "", "mistakes": self.worst("The lowest correlations with where people looked.", "Every map is as it was given.")}


OF_TASKS = {"classification": _Classes, "restoration": _Pictures, "saliency": _CutOuts, "fixations": _Looks}  # others give labels


def _shades(values: np.ndarray) -> Image.Image:
    """Numbers (H, W) from 0, black, to 1, white."""
    return Image.fromarray(np.rint(255 * values.clip(0, 1)).astype(np.uint8))


def _furthest(pictures: Mapping[str, torch.Tensor], side: int = 96) -> dict[str, Image.Image]:
    """Of pictures (C, H, W) the square where "restored" differs most from "true"."""
    error = (pictures["restored"].float() - pictures["true"].float()).square().mean(0)
    height, width = (min(side, length) for length in error.shape)
    means = torch.nn.functional.avg_pool2d(error[None], (height, width), 8)[0]
    row, column = (8 * place for place in divmod(int(means.argmax()), means.shape[1]))
    square = (slice(None), slice(row, row + height), slice(column, column + width))
    return {name: Image.fromarray(picture[square].permute(1, 2, 0).expand(-1, -1, 3).numpy().copy()) for name, picture in pictures.items()}


class _Scenes(_Areas):
    """Of mmsegmentation's segmentors."""

    background = False

    def __init__(self, dataset: Any):
        palette = dataset.metainfo.get("palette")
        super().__init__(dataset, np.asarray(palette, np.uint8) if palette else np.resize(COLOURS, (len(dataset.metainfo["classes"]), 3)))

    def add(self, batch: dict, samples: Sequence[Any]) -> None:
        for sample in samples:
            target, answer = (part.data[0].cpu().numpy() for part in (sample.gt_sem_seg, sample.pred_sem_seg))
            self.compare(target, answer, lambda path=sample.img_path, target=target, answer=answer: (
                Path(path).name, mistakes.masks(open_picture(path), target, answer, self.colours, background=False)))
            self.count += 1

    def said(self, rows: Sequence[Row]) -> dict:
        self.missing(self.confusion.sum(1))
        return {"by": "iou", "mistakes": self.worst_masks()}


class _Detections(_Answers):
    """Of mmdetection's detectors."""

    most = WORST["boxes"]

    def __init__(self, dataset: Any):
        super().__init__(dataset)
        self.given = np.zeros(len(self.names), np.int64)

    def add(self, batch: dict, samples: Sequence[Any]) -> None:
        for sample in samples:
            given = self.dataset.get_data_info(self.count)["instances"]
            target = Boxes(np.array([each["bbox"] for each in given], np.float64).reshape(-1, 4),
                           np.array([each["bbox_label"] for each in given], np.int64),
                           crowd=np.array([each.get("ignore_flag", 0) for each in given], bool))
            found = sample.pred_instances
            found = found[found.scores >= THRESHOLD].cpu().numpy()
            sure = Boxes(found.bboxes.astype(np.float64), found.labels.astype(np.int64), found.scores)
            self.given += np.bincount(target.labels[~cast(np.ndarray, target.crowd)], minlength=len(self.names))
            missed, false = per_class.unmatched(target, sure)
            self.offer(int(missed.sum() + false.sum()), lambda path=sample.img_path, target=target, sure=sure, missed=missed, false=false:
                       self._pictured(path, target, sure, missed, false))
            self.count += 1

    def _pictured(self, path: str, target: Boxes, answer: Boxes, missed: np.ndarray, false: np.ndarray) -> Mistake:
        scores = cast(np.ndarray, answer.scores)
        right = [(box, f"{self.names[label]} {score:.0%}", mistakes.FALSE if wrong else mistakes.RIGHT)
                 for box, label, score, wrong in zip(answer.boxes, answer.labels, scores, false, strict=True)]
        lost = [(box, self.names[label], mistakes.MISSED) for box, label in zip(target.boxes[missed], target.labels[missed], strict=True)]
        drawn = sorted(right, key=lambda one: one[2] == mistakes.FALSE) + lost
        return Mistake(f"{missed.sum()} missed, {false.sum()} false", f"{Path(path).name}; {len(target.labels)} objects are given",
                       [("boxes", mistakes.boxes(open_picture(path), drawn))])

    def said(self, rows: Sequence[Row]) -> dict:
        self.missing(self.given)
        return {"by": "ap", "mistakes": self.worst(
            f"The pictures with most boxes that are missed or false, at scores from {THRESHOLD:.0%} and an overlap (IoU) from 50%.",
            "No box is missed or false.", mistakes.BOXES)}


def _picture(inputs: torch.Tensor, config: Mapping) -> Image.Image:
    """What the model saw, (C, H, W), as a picture."""
    if len(inputs) not in (1, 3):
        return grey(inputs[0].float().cpu().numpy())
    mean, std = (np.array(config[name], np.float32) for name in ("mean", "std"))
    pixels = inputs.float().cpu().numpy().transpose(1, 2, 0) * std + mean
    pixels = (pixels.clip(0, 1) * 255).round().astype(np.uint8)
    return Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[..., 0])


def _report(config: Config, paths: _Paths, scalars: Scalars, model: Any, trained_on: Any, evaluated: dict) -> Report:
    """What the page says, from all that is known; `evaluated` is what `_evaluate` gives, or empty."""
    notes, metrics, held_out = list(evaluated.pop("notes", ())), evaluated.pop("metrics", {}), evaluated.pop("samples", None)
    unit, key = ("epoch", "max_epochs") if "max_epochs" in config.train_cfg else ("iteration", "max_iters")
    newest, chosen = (cast(dict, load_from_local(path))["meta"] for path in (paths.newest, paths.checkpoint))
    planned, reached, at = config.train_cfg[key], *(meta["epoch" if unit == "epoch" else "iter"] for meta in (newest, chosen))
    wanted = config.default_hooks.get("checkpoint", {}).get("save_best")
    best = next((name for name in ([wanted] if isinstance(wanted, str) else wanted or ()) if name in metrics), None)
    is_best = paths.checkpoint.name.startswith("best_")

    by_class = {f"{prefix}/{name}" for prefix in ("iou", "dice") for name in evaluated.get("classes", ())}
    means = ("iou/mean", "dice/mean")
    metrics = {name: value for name, value in metrics.items() if not (name.startswith("coco/") and value == -1)}  # of sizes that none has
    heads = sorted((name for name in metrics if name in means or name not in by_class), key=lambda name: (name != best, name not in means))
    numbers = {f"best {unit}" if is_best else unit: f"{at} of {planned}",
               **{name: _number(name, metrics[name]) for name in heads[:NUMBERS]}}

    if held_out is None:
        notes.append("The config has no validation data: nothing is known of how well the model answers.")
    for name in heads:
        logged = dict(scalars.held_out.get(name, ())).get(at, math.nan)
        if not math.isfinite(metrics[name]):
            notes.append(f"{name} is not a finite number.")
        elif abs(logged - metrics[name]) > max(0.01 * abs(logged), 1e-3):
            notes.append(f"{name} is {metrics[name]:.4g} here, and training logged {logged:.4g} at {unit} {at}: "
                         "data, code or precision have changed since.")
    if reached < planned:
        hooks = config.get("custom_hooks") or []
        early = next((f", stopped early, as the config asks where {hook.monitor} gets no better" for hook in hooks
                      if hook.type == "EarlyStoppingHook"), "")
        notes.append(f"{reached} of {planned} {unit}s are done: the training was interrupted{early}, or still goes on.")

    network = getattr(model, "name", None)
    if network is None:  # of a toolbox
        network = f"{type(model).__name__} with {getattr(model.backbone, 'name', type(model.backbone).__name__)}"
    data = _source(config, trained_on)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    ended = datetime.strptime(newest["time"], STAMP)
    begun = scalars.begun[0] if scalars.begun else ended
    runs = f", in {len(scalars.begun)} runs" if len(scalars.begun) > 1 else ""
    facts = {
        "Model": f"{network}, {parameters / 1e6:.2f} million parameters",
        "Data": f"{data}: {len(trained_on):,} samples to train on" + (f", {held_out:,} held out" if held_out else ""),
        **({"Classes": first_few(trained_on.metainfo["classes"], NAMED)} if len(trained_on.metainfo["classes"]) else {}),
        "Checkpoint": f"{paths.checkpoint.name}, of {unit} {at}" + (f", the best by {best}" if is_best and best else ""),
        "Trained": f"{begun:%Y-%m-%d %H:%M} to {ended:{'%H:%M' if ended.date() == begun.date() else '%Y-%m-%d %H:%M'}}{runs}",
    }
    resume = ["zoo", "train", str(paths.config), "--work-dir", str(paths.work_dir), "--resume"]
    if done := reached >= planned:
        resume += ["--cfg-options", f"train_cfg.{key}={2 * planned}"]
    commands = {"Go on training" + (f", to {2 * planned} {unit}s" if done else ""): shlex.join(resume),
                "Use the model": shlex.join(["zoo", "predict", str(paths.checkpoint), "pictures/", "-o", "answers/"])}
    charts = training_charts(scalars, at if is_best else None)
    return Report(f"{network} on {data}", numbers, facts, notes, commands, charts,
                  f"Written by zoo {zoo.__version__} on {datetime.now():%Y-%m-%d at %H:%M}.", **evaluated)


def _source(config: Config, dataset: Any) -> str:
    """Where the data lie: the folder of all files, if the dataset names them, or what the config says; or else the dataset's type."""
    files = [path for path, _ in getattr(dataset, "samples", ())] or getattr(dataset, "names", ())
    if hasattr(dataset, "get_data_info"):  # of a toolbox
        files = [dataset.get_data_info(index)["img_path"] for index in range(len(dataset))]
    if files and Path(files[0]).is_file():
        return os.path.commonpath([Path(path).parent for path in files])
    described = config.train_dataloader.dataset
    return str(described.get("root") or described.get("data_root") or config.get("data_root") or described.type)


def _number(name: str, value: float) -> str:
    if not math.isfinite(value):
        return "not a number"
    return f"{value:.1f}%" if name.startswith(PERCENT) else f"{value:.3f}"

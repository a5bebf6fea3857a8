"""What the problems of `make gpu` should take, ours and every rival, by a model of GPUs, into benchmarks/kernels_model.md.

Every side runs on tensors without memory, and every call of an operator that touches memory is one kernel, whose time is the longest
of three: to move its bytes, to multiply its matrices, and to issue the instructions of its inner loop. Instructions are counted in
machine code: of our kernels as they are launched, of flash attention in the torch that is installed. Only attention and the
selective scan are bound by them; for other kernels they are not counted, nor is any but
the longest loop, as a scan's walk to its states on the way back. A compiled rival is taken to fuse all that is no product of
matrices. Pyramid sparse attention is left out: its work hangs on values. So are compiled scans, whose instructions would bind them, too.
"""
import contextlib
import math
import re
import subprocess
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import conv_flop_count, flop_registry

from zoo import kernels
from zoo.files import replacing
from zoo.kernels import _backends, _launch, machine_code
from zoo.kernels.machine_code import CUOBJDUMP, inner_loop_of_sass
from zoo.kernels.routing_attention import triton as routing
from zoo.kernels.selective_scan import triton as scans
from zoo.measuring.kernel_benchmark import PASSES, Side

from . import kernel_cases, kernel_rivals

FILE = Path(__file__).with_name("kernels_model.md")
DTYPE = torch.bfloat16
FLASH_TILE = 128  # queries and keys of a program of flash attention with 32 channels a head
LEFT_OUT = {"pyramid_sparse_attention"}  # whose work values decide, which tensors without memory do not have
# mmcv's operator knows no tensors without memory; it does what torchvision's does. The recomputed scan is one operator, of many kernels.
UNSEEN = {"mmcv", "recomputed", "in chunks, compiled", "position by position, compiled"}
BOUND_BY_INSTRUCTIONS = "routing_attention", "selective_scan"
aten = torch.ops.aten


class Device(NamedTuple):
    """By its data sheet. The clock is the one at which the sheet's products are done."""

    name: str
    target: str
    bandwidth: float  # bytes a second
    products: float  # operations a second, dense bfloat16
    processors: int
    clock: float

    def seconds(self, part: "Part") -> float:
        issued = 4 * self.processors * self.clock
        return max(part.bytes / self.bandwidth, part.operations / self.products, part.instructions.get(self.target, 0.0) / issued)


DEVICES = (Device("H200", "sm_90", 4.8e12, 989e12, 132, 1.83e9), Device("H100", "sm_90", 3.35e12, 989e12, 132, 1.83e9),
           Device("A100", "sm_80", 2.04e12, 312e12, 108, 1.41e9))


class Part(NamedTuple):
    """One kernel: bytes moved, operations of products of matrices, and warps' instructions by target."""

    name: str
    bytes: float
    operations: float
    instructions: dict[str, float]


# What stands for flash attention, which knows no tensors without memory.


@torch.library.custom_op("benchmarks::attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor, scores: int) -> tuple[Tensor, Tensor]:
    """The result, and the logarithm of the softmax's denominators."""
    raise NotImplementedError


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scores: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("benchmarks::attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor, scores: int
) -> tuple[Tensor, Tensor, Tensor]:
    raise NotImplementedError


@_attention_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor, scores: int
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _keep(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scores = inputs
    ctx.save_for_backward(*tensors, *output)


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *_attention_backward(grad, *ctx.saved_tensors, ctx.scores), None


_attention.register_autograd(_differentiate, setup_context=_keep)


def attention(q: Tensor, k: Tensor, v: Tensor, scores: int) -> Tensor:
    return _attention(q, k, v, scores)[0]


def padded(queries: int, keys: int) -> int:
    """Scores that flash attention works out for so many."""
    return math.prod(math.ceil(n / FLASH_TILE) * FLASH_TILE for n in (queries, keys))


class _Flash(TorchFunctionMode):
    """torch's attention, whose scores are padded to tiles; masks only move bytes."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        q, k, v, *_ = args
        return attention(q, k, v, math.prod(q.shape[:2]) * padded(q.shape[2], k.shape[2]))


@cache
def flash_instructions(target: str) -> dict[str, float]:
    """Instructions of a warp for each score, of the forward and of the backward pass, with 32 channels a head in bfloat16.

    Counted in the innermost loop of torch's own binary.
    """
    library = Path(torch.__file__).parent / "lib" / "libtorch_cuda.so"
    traits = r"I23Flash_[fb]wd_kernel_traitsILi32ELi128ELi128E[^v]*?bfloat16_t[^v]*?"
    found = {}
    options = "ELb0ELb0ELb0ELb0ELb1ELb1ELb0"  # nothing but attention, of any length
    for name, kernel, flags, warps in (("forward", "16flash_fwd_kernel", f"{options}ELb0EEEv", 4),
                                       ("backward", "44flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel", f"{options}EEEv", 8)):
        pattern = rf"_ZN13pytorch_flash{kernel}{traits}{flags}NS_16Flash_[fb]wd_paramsE\0"
        symbols = sorted(set(re.findall(pattern.encode(), library.read_bytes())))
        command = [CUOBJDUMP, "-sass", "-arch", target, "-fun", symbols[0].decode().rstrip("\0"), library]
        code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found[name] = inner_loop_of_sass(code) * warps / FLASH_TILE**2
    return found


def own_instructions(launches: list[_launch.Launch], target: str, batch: int) -> float:
    """Of kernels as they were recorded for one image of the batch."""
    return sum(batch * (_states if launch.name in scans.IN_A_TURN else _routed_scores)(launch) * _counted(launch, target)
               for launch in launches)


def _routed_scores(launch: _launch.Launch) -> int:
    """That the programs work out, padding and what is masked included."""
    given = launch.arguments | launch.configuration
    queries = given["QUERIES"], given["h"] * given["w"], given["height"] * given["width"]
    keys = given["KEYS"], given["kv_h"] * given["kv_w"], given["kv_height"] * given["kv_width"]
    (held, *_), (size, places, everything) = (keys, queries) if launch.name.endswith("backward_keys") else (queries, keys)
    if given["PACKED"]:
        turns = math.ceil(everything / size)
    else:
        turns = given["slots"] * math.ceil(places / size) if places >= size else math.ceil(given["slots"] * places / size)
    return _programs(launch, given) * held * turns * size


def _programs(launch: _launch.Launch, given: dict[str, Any]) -> int:
    return math.prod(launch.grid(given) if callable(launch.grid) else launch.grid)


def _states(launch: _launch.Launch) -> int:
    """That the programs of a selective scan work out, those beyond the channels and positions included."""
    given = launch.arguments | launch.configuration
    steps = given["STEPS"]
    return _programs(launch, given) * given["WIDTH"] * given["CHANNELS"] * math.ceil(given["length"] / steps) * steps


def _counted(launch: _launch.Launch, target: str) -> float:
    """Instructions of a warp for each score or state, in the machine code that the launch becomes."""
    given = launch.arguments | launch.configuration
    constants = *(item for item in given.items() if item[0].isupper() or item[0] in launch.configuration),
    if (launch.name, target, constants) not in _COUNTS:
        (compiled_for,) = (one for one in machine_code.TARGETS if one.name == target)
        compiled = machine_code._compile(launch, "", compiled_for, (routing.IN_A_TURN | scans.IN_A_TURN)[launch.name])
        _COUNTS[launch.name, target, constants] = compiled.instructions or 0.0
    return _COUNTS[launch.name, target, constants]


_COUNTS: dict[Any, float] = {}

GATHERS = {aten.index_select.default, aten.gather.default, aten.index.Tensor}  # read as much as they write
SCATTERS = {aten.index_add_.default, aten.index_add.default, aten.scatter_add_.default, aten.scatter_add.default,
            aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default, aten.index_copy.default}
FREE = {aten.empty.memory_format, aten.new_empty.default, aten.empty_like.default, aten.empty_strided.default, aten.detach.default}


class Counted(TorchDispatchMode):
    """Lists the kernels that run inside. `fused`: only products of matrices and sorting, with what is written for them and read back."""

    def __init__(self, fused: bool, own: dict[str, dict[str, float]]):
        super().__init__()
        self.fused, self.own, self.parts, self.made = fused, own, [], set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        read = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        written = [x for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, Tensor)]
        storages = {x.untyped_storage()._cdata for x in read}
        in_place = func._schema.is_mutable
        if func in FREE or not written or (not in_place and all(x.untyped_storage()._cdata in storages for x in written)):
            return out
        products = func._overloadpacket in flop_registry
        if self.fused and not (products or func is aten.topk.default):
            self.made |= {x.untyped_storage()._cdata for x in written}
            return out
        moved = sum(map(_bytes, read)) + sum(map(_bytes, written))
        if func in GATHERS:
            moved = 2 * sum(map(_bytes, written)) + sum(map(_bytes, read[1:]))
        elif func in SCATTERS:
            values, places = ([_bytes(x) for x in read if x.is_floating_point() == wanted] for wanted in (True, False))
            moved = 3 * min(values) + sum(places)
        elif "deform_conv2d" in str(func) and "torchvision" in str(func):  # columns in float32, written and read
            x, weight, offset = read[:3] if "backward" not in str(func) else read[1:4]
            columns = 4 * offset.shape[0] * x.shape[1] * math.prod(weight.shape[2:]) * math.prod(offset.shape[2:])
            moved += columns * (6 if "backward" in str(func) else 2)
        if self.fused:
            moved += sum(_bytes(x) for x in read if x.untyped_storage()._cdata in self.made)
        if func is aten.convolution_backward.default:  # torch's own formula leaves groups out of account
            operations = 2.0 * conv_flop_count(list(args[1].shape), list(args[2].shape), list(args[0].shape))
        else:
            operations = float(flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)) if products else 0.0
        self.parts.append(Part(str(func), moved, operations, self._instructions(func, args, out)))
        return out

    def _instructions(self, func: Any, args: tuple, out: Any) -> dict[str, float]:
        name = func._overloadpacket.__name__
        if name in ("attention", "attention_backward") and "benchmarks" in str(func):
            which = "backward" if name.endswith("backward") else "forward"
            return {target: args[-1] * flash_instructions(target)[which] for target in ("sm_80", "sm_90")}
        return self.own.get(name, {})


def _bytes(x: Tensor) -> int:
    return min(x.numel() * x.element_size(), x.untyped_storage().nbytes())


def parts(side: Side, kind: str, fused: bool, own: dict[str, dict[str, float]]) -> list[Part]:
    """The kernels of a side in a pass."""
    counted = Counted(fused, own)
    with _Flash(), counted, torch.set_grad_enabled(kind != PASSES[0]):
        out = side.run()
        if kind != PASSES[0]:
            torch.autograd.grad(out, side.leaves, torch.empty_like(out), allow_unused=True)  # FlexAttention's positions
    if fused:  # what a graph is given and what it gives
        ends = sum(map(_bytes, side.leaves)) + _bytes(out)
        counted.parts.append(Part("ends", ends if kind == PASSES[0] else 3 * ends, 0.0, {}))
    return counted.parts


class _LookedOn(TorchDispatchMode):
    """Operators then go through torch.library, which asks no kernels for tensors without memory."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def modelled() -> Iterator[None]:
    """Operators run their kernels on tensors without memory, and rivals what stands for flash attention."""
    real_mask, real_varlen, in_regions = kernel_rivals.halo_mask, kernel_rivals.varlen, kernel_rivals._in_regions

    def flex_routes(qkv: Tensor, routes: Tensor, regions: int, heads: int, scale: float) -> Tensor:
        x, _ = kernel_rivals._in_regions(qkv, regions)
        b, r, t, _ = x.shape
        q, k, v = x.flatten(1, 2).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        size, topk = 64 if t % 64 == 0 else 128, routes.shape[2]
        some = torch.rand(1, r, r, generator=torch.Generator().manual_seed(0)).topk(topk, -1).indices
        needed = kernel_rivals.needed_blocks(torch.zeros(1, r, r).scatter(2, some, 1.0) > 0, t, size)
        return kernel_rivals.pasted_heads(attention(q, k, v, int(needed.sum()) * size**2 * b * heads).unflatten(2, (r, t)).transpose(1, 2)
                                          .flatten(0, 1), regions, qkv)

    def flex(q: Tensor, k: Tensor, v: Tensor, score_mod: object, mask: Any, scale: float, options: object = None) -> Tensor:
        blocks = int(mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum())
        return attention(q, k, v, math.prod(q.shape[:2]) * blocks * math.prod(mask.BLOCK_SIZE))

    def varlen(q: Tensor, k: Tensor, v: Tensor, q_ends: Tensor, k_ends: Tensor, q_most: int, k_most: int, scale: float) -> Tensor:
        return attention(q, k, v, (len(q_ends) - 1) * q.shape[1] * padded(q_most, k_most))

    def varlen_routes(qkv: Tensor, **given: Any) -> Tensor:
        """How many positions of ragged maps there are is not known without memory: all of the regions count."""
        with mock.patch.object(kernel_rivals, "_in_regions", lambda x, regions: (in_regions(x, regions)[0], None)):
            return real_varlen(qkv, **given)

    with (mock.patch.object(_backends, "obstacle", lambda device, dtype: None), kernels.default_backend("triton"),
          mock.patch.object(torch, "is_autocast_enabled", lambda *device: False),  # refuses to be asked about tensors without memory
          mock.patch.object(kernel_rivals, "flex_routes", flex_routes), mock.patch.object(kernel_rivals, "_flex", flex),
          mock.patch.object(kernel_rivals, "halo_mask", lambda length, block, halo, device: real_mask(length, block, halo, "cpu")),
          mock.patch.object(kernel_rivals, "_varlen_on_cpu", varlen), mock.patch.object(kernel_rivals, "varlen", varlen_routes),
          _LookedOn()):
        yield


def of_one_image(operator: str = "routing_attention") -> Iterator[dict[str, list[_launch.Launch]]]:
    """What each case of an operator launches in a forward and a backward pass, by target, on the CPU and without launching it."""
    with (mock.patch.object(kernel_cases, "BATCHES", dict.fromkeys(kernel_cases.BATCHES, 1)), mock.patch.object(kernel_cases, "SCANNED", 1),
          kernels.default_backend("pytorch")):
        for case in kernel_cases.CASES[operator]("cpu", DTYPE, False):
            found = {}
            for target in {device.target for device in DEVICES}:
                with kernels.default_backend("triton"), _launch.recording(target) as found[target]:
                    out = case.ours.run()
                    torch.autograd.grad(out, case.ours.leaves, torch.empty_like(out))
            yield found


class Row(NamedTuple):
    operator: str
    case: str
    kind: str
    side: str
    kernels: int
    bytes: float
    seconds: dict[str, float]  # by device


def rows() -> Iterator[Row]:
    """Of every case, pass and side. BiFormer-B's stages are S's but wider, and which regions are routed does not matter here."""
    with modelled():
        images = {operator: list(of_one_image(operator)) for operator in BOUND_BY_INSTRUCTIONS}
        for operator, cases in kernel_cases.CASES.items():
            if operator in LEFT_OUT:
                continue
            for number, case in enumerate(cases("meta", DTYPE, False)):
                if "BiFormer-B" in case.name or "one region" in case.name:
                    continue
                own = {}
                if operator in BOUND_BY_INSTRUCTIONS:
                    batch = case.ours.leaves[0].shape[0]
                    for name, end in ((f"{operator}_triton", "forward"), (f"{operator}_triton_backward", "backward")):
                        own[name] = {target: own_instructions([one for one in launches if end in one.name], target, batch)
                                     for target, launches in images[operator][number].items()}
                sides = {"ours": case.ours} | case.rivals | case.floors
                for kind in PASSES:
                    for name, side in sides.items():
                        if name in UNSEEN:
                            continue
                        found = parts(side, kind, name.endswith(", compiled") and "Flex" not in name, own)
                        seconds = {device.name: sum(map(device.seconds, found)) for device in DEVICES}
                        yield Row(operator, case.name, kind, name, len(found), sum(part.bytes for part in found), seconds)


WHY_NOT = {  # what keeps a rival from being a backend where it would win
    "gathered sdpa":
        "It copies keys and values as often as they are routed, flash attention's backward pass adds in no fixed order, and where regions "
        "reach off the map its mask takes torch's slower kernel, to which the model gives flash attention's speed.",
    "varlen flash":
        "The same copies and order of adding, and where regions reach off the map the host waits for the lengths.",
    "masked sdpa":
        "The mask takes H·W × H·W bytes of every image and torch's slower kernel, to which the model gives flash attention's speed, and a "
        "NaN in a region that is not routed reaches every query.",
    "FlexAttention":
        "It runs only inside `torch.compile`, for the shapes that were compiled; the model leaves out what its masks and positions cost in "
        "instructions.",
    "grouped":
        "The model takes convolutions with one channel in a group to move their bytes as fast as memory can. Whether they do, `make gpu` "
        "says: it is a backend already, and would be the GPU's.",
}


def page(found: list[Row]) -> str:
    lines = ["# The kernels and their rivals by a model", "", "Written by `python -m benchmarks.kernel_model`; no GPU has measured it. "
             f"{' '.join((__doc__ or '').partition(chr(10) * 2)[2].split())}", "",
             "| device | TB/s | TFLOP/s | instructions of warps a second |", "| --- | ---: | ---: | ---: |"]
    for d in DEVICES:
        lines.append(f"| {d.name} | {d.bandwidth / 1e12:.2f} | {d.products / 1e12:.0f} | {4 * d.processors * d.clock / 1e12:.2f}·10¹² |")
    flash = {target: flash_instructions(target) for target in ("sm_80", "sm_90")}
    counts = [f"{of['forward']:.3f} + {of['backward']:.3f} on {target}" for target, of in flash.items()]
    lines += ["", f"Flash attention of 32 channels a head, of torch {torch.__version__}, takes for each score of its tiles of 128 × 128 "
              f"(forward + backward) {' and '.join(counts)} instructions of a warp. Ours take, by problem, for each score or state of a "
              "scan:", ""]
    for kernel in sorted({entry[:2] for entry in _COUNTS}):
        counted = sorted({f"{instructions:.3f}" for entry, instructions in _COUNTS.items() if entry[:2] == kernel})
        lines.append(f"- `{kernel[0]}` on {kernel[1]}: {', '.join(counted)}")
    lines += [""]
    ours = {(row.operator, row.case, row.kind): row for row in found if row.side == "ours"}

    def ratio(row: Row, device: str = "H100") -> float:
        return row.seconds[device] / ours[row[:3]].seconds[device]

    lines += ["## Where a rival would win", "", "On H100, and why it is not a backend there all the same.", ""]
    for operator, name in dict.fromkeys((row.operator, row.side) for row in found if row.side != "ours" and "floor" not in row.side):
        wins = [row for row in found if (row.operator, row.side) == (operator, name) and ratio(row) < 1]
        if wins:
            where = "; ".join(f"{row.case}, {row.kind} ({ratio(row):.2f} of our time)" for row in wins)
            lines.append(f"- {operator}, {name}: {where}. {WHY_NOT[name.removesuffix(', compiled')]}")
    lines += ["", "## Goals", "",
              "Of routing attention four times the authors' speed, forward and backward; of the rest half as fast again as the best rival. "
              "The floor is flash attention of the same queries over the same keys, already gathered and none of it masked. On H100.", "",
              "| problem, forward + backward, rival | rival / ours | rival / floor | ours / floor | goal |",
              "| --- | ---: | ---: | ---: | --- |"]
    for key in ours:
        if key[2] == PASSES[0]:
            continue
        others = {row.side: row for row in found if row[:3] == key and row.side != "ours"}
        floor = next((row for name, row in others.items() if "floor" in name), None)
        rival = others["authors"] if floor else min(others.values(), key=ratio)
        goal = 4.0 if floor else 1.5
        reached = "by the model" if ratio(rival) >= goal else "not by the model"
        if floor and rival.seconds["H100"] / floor.seconds["H100"] < goal:
            reached += "; beyond the floor"
        of_floor = (f"{rival.seconds['H100'] / floor.seconds['H100']:.2f}", f"{1 / ratio(floor):.2f}") if floor else ("", "")
        lines.append(f"| {key[0]}, {key[1]}, {rival.side} | {ratio(rival):.2f} | {of_floor[0]} | {of_floor[1]} | {goal:g}×: {reached} |")
    lines += ["", "## Everything", "", "An eager call takes the host some microseconds for every kernel, which are not counted.", "",
              f"| problem | pass | side | kernels | MB | {' | '.join(f'{d.name}, µs' for d in DEVICES)} | side / ours, H100 |",
              f"| --- | --- | --- | ---: | ---: | {'---: | ' * len(DEVICES)}---: |"]
    for row in found:
        times = " | ".join(f"{row.seconds[device.name] * 1e6:.0f}" for device in DEVICES)
        lines.append(f"| {row.operator}, {row.case} | {row.kind} | {row.side} | {row.kernels} | {row.bytes / 1e6:.0f} | {times} "
                     f"| {ratio(row):.2f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    with replacing(FILE) as written:
        written.write_text(page(list(rows())))
    print(f"wrote {FILE}")


if __name__ == "__main__":
    main()

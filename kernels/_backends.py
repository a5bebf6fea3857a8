"""Which implementation of an operator runs, and what all implementations are registered with.

An operator is a folder; the files in it whose names do not begin with an underscore are its backends: `reference`, the
definition, and what computes the same in other ways. Every public operator is a `public_operator` and asks `choose`. Nothing here
imports triton; operators do so when their kernels are to run.
"""
import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.flop_counter import _FlopCounterMode, flop_registry, register_flop_formula

from ._exporting import is_exporting
from ._interpreter import obstacle as obstacle_to_interpreting
from ._remembering import remember

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CAPABILITY = (8, 0)  # of NVIDIA GPUs: bfloat16 and asynchronous copies
MOST_SAMPLES = 65535  # of a batch, which is the second or third axis of CUDA's grids
EVERYWHERE = ("reference", "pytorch", "triton")  # what `default_backend` takes
BACKENDS = {
    folder.name: ("reference", "pytorch", *sorted(
        file.stem for file in folder.glob("*.py") if file.stem != "reference" and not file.stem.startswith("_")))
    for folder in sorted(path.parent for path in Path(__file__).parent.glob("*/reference.py"))
}

# A plain global, not a context variable: gradient checkpointing runs operators again in autograd's own thread.
_default: str | None = None

PLAIN = frozenset({Tensor, torch.nn.Parameter, int, float, bool, str, tuple, list, torch.Size, type(None)})
# Of a thread in which no mode, transform or tracer is at work, which all add keys of their own.
USUAL_KEYS = functools.reduce(int.__or__, (
    torch._C.DispatchKeySet(key).raw_repr() for key in (torch._C.DispatchKey.BackendSelect, torch._C.DispatchKey.ADInplaceOrView)))

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


@contextlib.contextmanager
def default_backend(backend: str | None) -> Iterator[None]:
    """Operators called inside without a `backend` of their own, such as by layers, run this one. Not for several threads.

    Args:
        backend: "reference", "pytorch", "triton" (where an operator has no kernels: "pytorch"), or None.
    """
    global _default  # noqa: PLW0603
    _check(backend, "default_backend", EVERYWHERE)
    before, _default = _default, backend
    try:
        yield
    finally:
        _default = before


def backends(operator: str) -> tuple[str, ...]:
    """What the argument `backend` of an operator of `zoo.kernels` takes beside None, e.g. `backends("routing_attention")`."""
    return BACKENDS["region_routes" if operator == "region_means" else operator]


def choose(
    operator: str, backend: str | None, x: Tensor, fast: Callable[[], str], exported: str = "reference",
    unsupported: Mapping[str, Callable[[], str | None]] = MappingProxyType({}),
) -> str:
    """The backend of `operator` that runs on arguments of x's device and dtype.

    Exported graphs always hold `exported`. Under transforms of torch.func and in forward-mode differentiation the reference runs,
    because autograd does not see through the others. The Triton kernels run on CUDA and HIP tensors that they support, on CPU
    tensors only in Triton's interpreter and only when asked for.

    Args:
        backend: the operator's argument; None for the choice of this machine.
        fast: the best of the backends in PyTorch for these arguments. Not asked where it does not matter: of the free sizes of an
            exported graph it would make assumptions.
        unsupported: what a backend cannot do with the operator's arguments, as a clause; asked as `fast` is.

    Raises:
        ValueError: an unknown `backend`, or one that cannot run.
    """
    names = backends(operator)
    _check(backend, operator, names)
    if is_exporting():
        return exported
    wanted = backend or (_default if _default in names else None)
    if (transform := _transform()) is not None:
        if wanted not in (None, "reference", "pytorch"):
            raise ValueError(f"{operator}: backend {wanted!r} cannot run here: {transform} needs backend 'reference'")
        return "reference"
    if wanted is None and "triton" in names and x.device.type == "cuda" and _of_triton(x, unsupported) is None:
        return "triton"
    if wanted in (None, "pytorch"):
        return fast()
    reason = _of_triton(x, unsupported) if wanted == "triton" else unsupported.get(wanted, _nothing)()
    if reason is not None:
        raise ValueError(f"{operator}: backend {wanted!r} cannot run here: {reason}")
    return wanted


def _nothing() -> None:
    return None


def _of_triton(x: Tensor, unsupported: Mapping[str, Callable[[], str | None]]) -> str | None:
    return obstacle(x.device, x.dtype) or _too_many(x) or unsupported.get("triton", _nothing)()


def _transform() -> str | None:
    """What is being done to the operator that only plain PyTorch bears, as a noun; None where nothing is."""
    if in_functorch():
        return "a transform of torch.func"
    return "forward-mode differentiation" if in_forward_mode() else None


def in_forward_mode() -> bool:
    """Whether tangents are carried along, by torch.func or autograd."""
    return forward_ad._current_level >= 0


@torch.compiler.assume_constant_result  # compiled functions are traced within the transforms that they hold, and run in no others
def in_functorch() -> bool:
    """Whether a transform of torch.func is at work."""
    return peek_interpreter_stack() is not None


def observed(arguments: tuple) -> bool:
    """Whether more than values is wanted of a call: a graph, what a mode or a transform makes of it, or a subclass."""
    return (torch.compiler.is_compiling() or not PLAIN.issuperset(map(type, arguments))
            or torch._C._dispatch_tls_local_include_set().raw_repr() & ~USUAL_KEYS != 0
            or in_forward_mode())


def autocasting(device: str) -> bool:
    """Whether autocast is on for this type of device, which may be one that has none."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def remembered(decide: Callable[..., Result]) -> Callable[..., Result]:
    """Keeps what `decide`, which begins with a tensor, finds for others of the same shapes, strides, dtypes and device.

    What is returned takes in the first place whether the call is `observed`; where it is, nothing is kept.
    """
    known: dict[Any, Result] = {}

    @functools.wraps(decide)
    def look_up(seen: bool, *arguments: Any) -> Result:
        if seen or not isinstance(arguments[0], Tensor):
            return decide(*arguments)
        kind = arguments[0].device.type
        mixed = torch.get_autocast_dtype(kind) if autocasting(kind) else None
        return remember(known, arguments, (_default, mixed, kind == "cpu" and interpreted()), decide)

    return look_up


class Direct:
    """An operator of `torch.library` and its derivative without the wrappers, which take longer than kernels do.

    Of token-aware pooling forward, where autograd looks on and where it does not, in microseconds on a CPU: 14 and 9 so, 23 and 14 through
    `custom_op`, 40 and 29 through `triton_op` and `wrap_triton`, which asks Triton's launcher anew about every argument.
    """

    def __init__(self, operator: Any, setup: Callable[[Any, tuple, Any], None], backward: Callable[..., Any]):
        """`setup` and `backward` are as they are given to `register_autograd`."""
        function = operator._init_fn

        class Differentiable(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *arguments: Any) -> Any:
                result = function(*arguments)
                setup(ctx, arguments, result)
                return result

        Differentiable.backward = staticmethod(backward)
        self._operator, self._function, self._apply = operator, function, Differentiable.apply

    def __call__(self, seen: bool, *arguments: Any) -> Any:
        """`seen`: whether the call is `observed`; where it is, it goes through torch.library."""
        if seen:
            return self._operator(*arguments)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            return self._apply(*arguments)
        return self._function(*arguments)


def public_operator(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """What torch's own functions are to whatever overrides them: fx's proxies and tensors' subclasses see one call.

    So it is a node of an fx graph, and its checks of shapes are not traced.
    """
    @functools.wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        given = *args, *kwargs.values()
        if has_torch_function(given):
            return handle_torch_function(call, given, *args, **kwargs)
        return function(*args, **kwargs)

    return call


def register_gradient(
    forward: Callable[..., Any], backward: Callable[..., tuple[Tensor, ...]], definition: Callable[..., Tensor],
    flops: Callable[..., int], kept: tuple[int, ...] = (),
) -> Direct:
    """Registers the derivatives of an operator of `torch.library`, and how many operations counters count for it.

    Args:
        forward: (*arguments) → the result, or a tuple that begins with it, of which no other is differentiable.
        backward: (grad, *arguments, *kept) → the gradients of all arguments that are floating tensors, and anything for those that
            could be and are None. Its own derivative is that of the definition, which autograd differentiates twice and more.
        definition: (*arguments) → the result, in plain PyTorch.
        flops: of the products in the definition, from its arguments, shapes in the place of tensors. Those of its gradients are twice
            as many, whatever else `backward` makes anew.
        kept: which results of `forward` to keep for `backward`.
    """
    kinds = [str(argument.type) for argument in forward._opoverload._schema.arguments]
    count, tensors = len(kinds), [i for i, kind in enumerate(kinds) if "Tensor" in kind]

    def setup(ctx: Any, inputs: tuple, output: Any) -> None:
        results = output if isinstance(output, tuple) else (output,)
        ctx.inputs = [None if i in tensors else x for i, x in enumerate(inputs)]
        ctx.save_for_backward(*[inputs[i] for i in tensors], *[results[i] for i in kept])
        if len(results) > 1:
            ctx.mark_non_differentiable(*results[1:])
        ctx.set_materialize_grads(False)

    def first(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        gradients: list[Tensor | None] = [None] * count
        if grad is not None:
            saved, arguments = ctx.saved_tensors, ctx.inputs.copy()
            for i, tensor in zip(tensors, saved, strict=False):
                arguments[i] = tensor
            arguments = grad, *arguments, *saved[len(tensors):]
            slots = [i for i, x in zip(tensors, saved, strict=False) if x is None or x.is_floating_point()]
            for i, gradient in zip(slots, call_backward(observed(arguments), *arguments), strict=True):
                if arguments[i + 1] is not None:
                    gradients[i] = gradient
        return tuple(gradients)

    def setup_again(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        _save(ctx, inputs)

    def second(ctx: Any, *directions: Tensor) -> tuple[Tensor | None, ...]:
        grad, *arguments = _saved(ctx)
        total, arguments, again = len(arguments) + 1, arguments[:count], torch.is_grad_enabled()
        along = {i: direction for i, direction in zip(_slots(arguments), directions, strict=True) if arguments[i] is not None}
        with torch.enable_grad():
            # Views, so that none of them is made of another, as the arguments may be.
            cotangent, *leaves = (t.view_as(t) if again and t.requires_grad else t.detach().requires_grad_()
                                  for t in (grad, *(arguments[i] for i in along)))
            given = dict(zip(along, leaves, strict=True))
            with torch.autocast(grad.device.type, enabled=False):
                out = definition(*(given.get(i, argument) for i, argument in enumerate(arguments))).to(grad.dtype)
            gradients = torch.autograd.grad(out, leaves, cotangent, create_graph=True, materialize_grads=True)
            found = torch.autograd.grad(
                gradients, (cotangent, *leaves), tuple(along.values()), create_graph=again, materialize_grads=True)
        of_arguments = dict(zip(along, found[1:], strict=True))
        return found[0], *(of_arguments.get(i) for i in range(total - 1))

    forward.register_autograd(first, setup_context=setup)
    backward.register_autograd(second, setup_context=setup_again)
    call_backward = Direct(backward, setup_again, second)

    def of_forward(*arguments: Any, **_: Any) -> int:
        return flops(*arguments)

    def of_backward(_: Any, *arguments: Any, **__: Any) -> int:
        return 2 * flops(*arguments[:count])

    register_flops(forward, of_forward)
    register_flops(backward, of_backward)
    return Direct(forward, setup, first)


def register_flops(operator: Callable[..., Any], formula: Callable[..., int]) -> None:
    """Tells counters the operations of an operator of `torch.library`; `formula` takes its arguments, shapes in the place of tensors."""
    packet = operator._opoverload.overloadpacket
    register_flop_formula(packet)(formula)
    for mode in _get_current_dispatch_mode_stack():  # kernels are imported when they run first, counters know what was there before
        if isinstance(mode, _FlopCounterMode):
            mode.counter.flop_registry.setdefault(packet, flop_registry[packet])


def _save(ctx: Any, values: tuple) -> None:
    ctx.others = [None if isinstance(value, Tensor) else value for value in values]
    ctx.save_for_backward(*(value if isinstance(value, Tensor) else None for value in values))


def _saved(ctx: Any) -> list:
    return [other if tensor is None else tensor for tensor, other in zip(ctx.saved_tensors, ctx.others, strict=True)]


def _slots(arguments: list) -> list[int]:
    """Which of them have gradients, or would have them if they were given."""
    return [i for i, x in enumerate(arguments) if x is None or isinstance(x, Tensor) and x.is_floating_point()]


@torch.compiler.assume_constant_result
def obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why no Triton kernel can run on tensors of this device and dtype, as a clause; None where it can."""
    if dtype not in DTYPES:
        return f"the kernels take {', '.join(map(name_of, DTYPES))}, not {name_of(dtype)}"
    if not _installed():
        return "the package triton is not installed"
    if device.type == "cpu":
        return obstacle_to_interpreting() if interpreted() else "on the CPU kernels run in Triton's interpreter only (TRITON_INTERPRET=1)"
    if device.type != "cuda":
        return f"the tensors are on {device.type}, not on a CUDA or HIP device"
    if torch.version.hip is None and torch.cuda.is_available() and (found := torch.cuda.get_device_capability(device)) < CAPABILITY:
        return f"{torch.cuda.get_device_name(device)} has compute capability {found}, the kernels need {CAPABILITY}"
    return None


def _too_many(x: Tensor) -> str | None:
    return None if x.shape[0] <= MOST_SAMPLES else f"the kernels take at most {MOST_SAMPLES} samples, not {x.shape[0]}"


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def operators_with_kernels() -> list[str]:
    """The folders of operators that hold Triton kernels."""
    return [operator for operator, names in BACKENDS.items() if "triton" in names]


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _check(backend: str | None, operator: str, names: tuple[str, ...]) -> None:
    if backend is not None and backend not in names:
        raise ValueError(f"{operator}: backend must be None or one of {', '.join(map(repr, names))}, got {backend!r}")

"""Looking at what layers compute on the way: gates, attention weights, routes, offsets."""
import contextlib
from collections.abc import Callable, Iterator

from torch import Tensor, nn

Maps = dict[str, dict[str, Tensor]]
_TAKER = "_takes_reports"  # in a module's __dict__ while it is captured


@contextlib.contextmanager
def capture(model: nn.Module) -> Iterator[Maps]:
    """Collects what the layers of `model` report about themselves while the block runs.

        with zoo.capture(model) as maps:
            model(image)
        maps["decoder.0.gate"]["attention"]

    `maps` holds, by the names of the modules that ran and report anything, the tensors of their last pass, by what they
    are; each layer's docstring says which. They are the tensors of the pass itself, with their graph where gradients are
    recorded. Blocks may be nested; the innermost gets the reports. Not for models under torch.compile.
    """
    maps: Maps = {}
    modules = dict(model.named_modules())
    outer = {name: vars(module).get(_TAKER) for name, module in modules.items()}

    def taker(name: str) -> Callable[[dict[str, Tensor]], None]:
        return lambda reported: maps.update({name: {**maps.get(name, {}), **reported}})

    try:
        for name, module in modules.items():
            vars(module)[_TAKER] = taker(name)
        yield maps
    finally:
        for name, module in modules.items():
            vars(module)[_TAKER] = outer[name]
            if outer[name] is None:
                del vars(module)[_TAKER]


def report(layer: nn.Module, **maps: Tensor | Callable[[], Tensor]) -> None:
    """Called by a layer in its forward pass: hands `maps` to the block that captures it, if there is one.

    What costs anything to compute comes as a function, which is called only then.
    """
    take = vars(layer).get(_TAKER)
    if take is not None:
        take({name: value() if callable(value) else value for name, value in maps.items()})

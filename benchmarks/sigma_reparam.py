"""What σReparam costs: timm's ViT reparametrized, with norms and without, and folded again, beside the plain one.

    python -m benchmarks.sigma_reparam > benchmarks/sigma_reparam.md
"""
import time

import timm
import torch

import zoo
from zoo.measuring.model_benchmark import PASSES, Report, compare, facts

NAME, SIZE = "vit_small_patch16_224", 224
HEAD = """# σReparam beside plain layers

`python -m benchmarks.sigma_reparam`: `zoo.reparametrize` on all blocks of timm's {name}; the rival is the plain network. Each pass
through a layer takes a step of the power iteration: two products of its weight with a vector, which do not grow with the images, so that
they weigh the less the larger the batch is. `zoo.fold` makes plain layers of them again.

{table}"""


def costs(batches: tuple[int, ...], rounds: int) -> Report:
    torch.set_num_threads(2)
    comparisons, plain = [], timm.create_model(NAME)
    models = {
        "reparametrized": zoo.reparametrize(timm.create_model(NAME), where="blocks"),
        "reparametrized, without norms": zoo.reparametrize(timm.create_model(NAME), where="blocks", keep_norms=False),
        "folded": zoo.fold(zoo.reparametrize(timm.create_model(NAME), where="blocks")),
    }
    for batch in batches:
        images = torch.randn(batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
        for what, model in models.items():
            for kind in PASSES:
                comparisons.append(compare(f"{what}, batch {batch}", kind, model, plain, images, rounds, time.perf_counter))
    return Report(facts(batches[-1], {NAME: f"{SIZE}x{SIZE}"}, "float32", rounds, "cpu", True), comparisons)


if __name__ == "__main__":
    print(HEAD.format(name=NAME, table=costs(batches=(1, 8), rounds=5).markdown()))

"""timm's own tests of models, run on the zoo's classification networks: `make timm-tests`, which needs no data and no weights.

The source distribution of the installed timm (downloaded once, into build/timm) holds tests/test_models.py, which takes its models from
`timm.list_models`. While it is collected that function knows the zoo's networks only, whatever modules the test asks for. Arguments
are pytest's: `python tests/timm_contract.py -k nano`. Fixed sizes, limits and exclusions are timm's.
"""
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest
import timm

ROOT = Path(__file__).parents[1]
LEFT_OUT = {  # by what the name of a test holds
    "torchscript": "the zoo refuses TorchScript in one sentence",
    "load_pretrained": "it downloads weights",
    "features_pretrained": "it downloads weights",
    # It expects maps of features, and these are tokens.
    "default_cfgs[1-vidat": "timm's test excepts its own vision transformers, by their names",
    # Its last map needs all branches, whose other outputs then have no user.
    "prune_intermediate_layers_contract[polarized_hrnet": "timm's test excepts its own HRNets, by their names",
    # It expects maps of features, and these are tokens.
    "default_cfgs[1-lambda_deit": "timm's test excepts its own DeiT, by their names",
}


def names() -> set[str]:
    """Of the zoo's classification networks."""
    import zoo

    return {name for name in zoo.list_models() if not zoo.models.is_dense(name)}


def test_file(folder: Path) -> Path:
    """timm's test_models.py of the installed version, below `folder`."""
    name = f"timm-{timm.__version__}"
    if not (folder / name).is_dir():
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", f"timm=={timm.__version__}", "-d", folder]
        if not (folder / f"{name}.tar.gz").is_file():
            subprocess.run(command, check=True)
        with tarfile.open(folder / f"{name}.tar.gz") as archive:
            archive.extractall(folder, filter="data")
    return folder / name / "tests" / "test_models.py"


class ZooModels:
    """Plugin of pytest: the zoo's models in the place of timm's, and what became of each test."""

    def __init__(self):
        self.names, self.left_out, self.outcomes = names(), Counter(), Counter()

    @pytest.hookimpl(hookwrapper=True)
    def pytest_pycollect_makemodule(self, module_path, parent):
        outcome = yield
        if module_path.name != "test_models.py":
            return
        with mock.patch.object(timm, "list_models", self._list_models(timm.list_models)):
            assert outcome.get_result().obj  # imports it

    def _list_models(self, every):
        def list_models(filter="", module="", **options):
            return [name for name in every(filter, **options) if name.partition(".")[0] in self.names]

        return list_models

    def pytest_collection_modifyitems(self, config, items):
        kept, others = [], []
        for item in items:
            name = getattr(item, "callspec", None) and item.callspec.params.get("model_name")
            ours = isinstance(name, str) and name.partition(".")[0] in self.names
            reason = next((why for part, why in LEFT_OUT.items() if part in item.name), None)
            if ours and reason:
                self.left_out[item.originalname, reason] += 1
            (kept if ours and not reason else others).append(item)
        items[:] = kept
        config.hook.pytest_deselected(items=others)

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed" and report.when == "setup":
            self.outcomes[report.nodeid.partition("::")[2].partition("[")[0], report.outcome] += 1

    def pytest_terminal_summary(self, terminalreporter):
        terminalreporter.section("timm's tests on the zoo's models")
        for (test, outcome), count in sorted(self.outcomes.items()):
            terminalreporter.write_line(f"{test}: {count} {outcome}")
        for (test, reason), count in sorted(self.left_out.items()):
            terminalreporter.write_line(f"{test}: {count} left out, as {reason}")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    path = test_file(ROOT / "build" / "timm")
    options = ["-q", "--tb=short", "-p", "no:cacheprovider", "-c", str(path.parents[1] / "pyproject.toml"), "-W", "ignore"]
    sys.exit(pytest.main([str(path), *options, *sys.argv[1:]], plugins=[ZooModels()]))

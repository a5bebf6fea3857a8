import pytest
import torch
from torch import nn

import zoo
from zoo.errors import InputError, said_by


@pytest.mark.parametrize(("error", "said"), [
    (ValueError("what is wrong\nand where"), "what is wrong"),
    (ValueError("\nfound the following:\n  - this\n  - that"), "found the following: - this"),
    (ValueError("nothing after this:"), "nothing after this:"),
    (KeyError(), "KeyError"),
])
def test_an_error_is_said_in_one_line(error, said):
    assert said_by(error) == said


def test_a_model_that_fails_without_a_word_is_named():
    class Silent(nn.Module):
        def forward(self, x):
            raise RuntimeError

    with pytest.raises(InputError, match="Silent does not run on an example of shape .*: RuntimeError"):
        zoo.attach(Silent(), "sk", example=torch.zeros(1, 3, 8, 8))

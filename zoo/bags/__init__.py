"""Heads that answer for bags of pictures: features of a frozen network, training, and what heads attend to."""

HEADS = {  # arguments of `zoo.layers.MultipleInstanceHead`
    "abmil": {"num_branches": 1, "masked": 0}, "acmil": {}, "acmil_multi_head": {"kind": "multi_head"}}

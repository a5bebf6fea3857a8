"""Heads that answer for bags of pictures: features of a frozen network, training, and what heads attend to."""

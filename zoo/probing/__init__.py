"""Heads on tokens of a frozen network that are computed once: the tokens in files, the training of heads, and their files."""

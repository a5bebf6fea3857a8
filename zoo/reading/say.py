"""What is said about data, once in a process."""
import functools
import logging

say_once = functools.cache(logging.getLogger("zoo").warning)

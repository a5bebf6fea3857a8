"""Time, memory and multiply-accumulates of models and kernels."""

DTYPES = ("float32", "bfloat16", "float16")

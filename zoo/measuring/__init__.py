"""Time, memory and multiply-accumulates of models and kernels."""

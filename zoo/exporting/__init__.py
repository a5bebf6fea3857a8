"""Models as ONNX files, compared with PyTorch, one by one or all, in lower precisions too."""

PRECISIONS = ("float32", "float16", "int8")

"""Models as ONNX files, compared with PyTorch, one by one or all, in lower precisions too."""

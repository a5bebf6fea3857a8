"""Models and tools on OpenMMLab's engine."""

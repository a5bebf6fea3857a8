"""Pictures of what models attend to, and of which pixels speak for a class."""

ATTRIBUTIONS = ("gradcam", "integrated_gradients", "fullgrad", "normgrad", "normgrad_meta")

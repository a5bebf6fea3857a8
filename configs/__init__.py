"""Training recipes: data for mmengine, installed with the package."""

"""Attention mechanisms as timm models: `import zoo`, then `timm.create_model(...)`."""

"""What mlx-lm's model classes gain, one module per family."""

"""Anthropic Messages and OpenAI Responses in front of mlx-lm's own generation."""

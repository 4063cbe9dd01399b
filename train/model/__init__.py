"""The diffusion transformer: tokens, rotary positions, layers."""

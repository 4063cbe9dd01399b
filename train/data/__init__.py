"""View, epoch order and loader over latent columns."""

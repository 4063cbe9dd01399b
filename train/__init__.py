"""Latent columns to a trained model. Imports pipeline.format and pipeline.settings; train.sample also decodes."""

"""Latent columns to a trained model.

Imports pipeline.format and pipeline.settings only; train.sample also decodes.
"""

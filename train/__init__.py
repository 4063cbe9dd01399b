"""Latent columns to a trained model.

Imports pipeline.format, .files and .settings only; train.sample also decodes.
"""

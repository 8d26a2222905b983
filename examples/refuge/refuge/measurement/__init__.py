"""Predictions of a trained network, and how good they are."""

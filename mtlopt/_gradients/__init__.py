"""Gradients: asking for losses, backward passes, averages, and their arithmetic."""

"""What a gradient is."""

"""Where photographs come from: REFUGE as released or re-packed, and synthetic phantoms."""

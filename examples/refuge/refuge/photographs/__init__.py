"""Reads photographs: REFUGE as released or re-packed, or synthetic phantoms."""

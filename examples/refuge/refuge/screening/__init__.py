"""Applies a network to photographs of any number and kind: reading, findings, tables and pages."""

"""Steps: the contract with torch, the two kinds of step, state, and whose update it is."""

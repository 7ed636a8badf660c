"""Pangu Ultra: train, extend, run and inspect deep dense language models with depth-scaled sandwich norm."""

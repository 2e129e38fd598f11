"""Detectors behind one interface: queries (`hf`, `deformable`) and dense ones (`dense`). `build` knows the names."""

"""`dtokd detect`: COCO-format data, detectors, objectives -> the loop of `dtokd train` -> run directory."""

"""The losses of a distilled student: what it imitates, of which teacher, through which projector.

`options` declares the command line's arguments, `build` makes a timm `TrainingTask` of them. One file per family of
losses; docs/objectives.md lists them.
"""

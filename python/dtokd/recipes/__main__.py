"""`python -m dtokd.recipes` prints the tables of all recipes."""

from . import markdown, tables

for name in tables():
    print(markdown(name))

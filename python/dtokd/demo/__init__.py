"""`dtokd demo`: one teacher, and the same small student distilled in every way that there is to compare."""

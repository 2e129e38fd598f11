"""`dtokd compare`: is distillation helping, with which rule, and is the difference real?"""

"""`dtokd train`: options -> data, student, task, optimizer -> engine -> run directory."""

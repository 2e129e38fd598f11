"""What the student is trained on: the task's loss and what it imitates of a teacher, on timm's tasks."""

"""Distillation: teachers, what they said, how their tokens answer to the student's, and the task."""

"""Training: the loop, losses, schedules, validation, the attention monitor, logs and the report."""

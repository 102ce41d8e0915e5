"""The Lightning side: steps, schedules, checkpoints."""

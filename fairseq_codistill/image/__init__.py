"""Image classification for fairseq: a task, models, learning rate schedules, an optimizer. Knows nothing of codistillation."""

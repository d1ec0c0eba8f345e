"""Measurements, a folder for each question; each is started in the repository's root: python -m benchmarks.FOLDER.FILE."""

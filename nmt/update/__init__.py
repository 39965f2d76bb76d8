"""The parts of one update: gradient, precision, optimizer, schedule, metrics; the story is `nmt/trainer.py`."""

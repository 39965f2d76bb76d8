"""The parts of a run: checks before it, what is due in it, and its reports. The story is `nmt/train_loop.py`."""

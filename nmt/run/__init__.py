"""A run: what is found out before it, said of it and due in it; the story is `nmt/train_loop.py`."""

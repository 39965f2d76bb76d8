"""What the operating system and the libraries below PyTorch do: signals, folders, memory, graphs of a GPU."""

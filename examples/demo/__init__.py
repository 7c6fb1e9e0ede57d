"""The demo: a memory taught to a real model on two CPU cores."""

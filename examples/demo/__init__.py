"""The demo: 100 facts are taught to a real model on two CPU cores, and everything else stays bit for bit as it was."""

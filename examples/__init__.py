"""Runnable examples; `demo` is the complete one."""

"""An experiment: what a model learns of a domain by a memory, by LoRA, and by both."""

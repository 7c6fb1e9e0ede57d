"""Serving: models behind servers. Never copied into a checkpoint."""

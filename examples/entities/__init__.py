"""A memory of hashed tables that is taught a list of named entities."""

"""Recipes joined to a chain: stages whose outputs are the next ones' inputs."""

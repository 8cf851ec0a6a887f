"""Hostile programs in, what they printed out: a jail of Linux namespaces, no docker, no service."""

"""Preparation of an export: everything that is decided, checked and estimated before any work."""

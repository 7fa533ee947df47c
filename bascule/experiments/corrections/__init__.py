"""Corrections by a person while a policy runs, beside as many fresh demonstrations."""

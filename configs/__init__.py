"""Configs that come with the library."""
